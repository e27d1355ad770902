"""Reference outputs of the original BERT in PyTorch, and how far the Flax port is from them.

    python experiments/reference_bert.py fixtures --out tests/zoo/fixtures/bert_tiny.json
    python experiments/reference_bert.py seeded --out bert_base_seeded.safetensors
    python experiments/reference_bert.py torch --weights W.safetensors --tokenizer T.json --out R
    python experiments/reference_bert.py compare --weights W.safetensors --reference R --out OUT
    python experiments/reference_bert.py answers --weights W.safetensors --tokenizer T.json \\
        --questions xquad.en.json --out OUT

`fixtures`, `seeded` and `torch` need PyTorch, transformers and tokenizers (2.13.0, 4.57.1 and
0.22.2 on Python 3.11 were used) and nothing of jax; the others need jaxrmils and no PyTorch, so
that the two can live in environments of their own. `fixtures` writes the outputs of tiny models
whose weights are computed from each tensor's name and shape, and `seeded` a checkpoint of BERT-
base's size with such weights. `torch` runs weights in float32 on made-up questions and stores
tokens and outputs in an `.npz` file; `compare` writes the largest absolute differences. `answers`
writes exact match and F1 of the port on a file in SQuAD's form. Relative paths of weights and data
are looked for in the folder that the environment variable JAXRMILS_DATA names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

TINY = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
TINY_CLASSES = 5
# The question answering checkpoint has short names.
RENAME = (("b.", "bert."), ("h.", "qa_outputs."))
TEXTS = (
    ("Who wrote it?", "The report was written by Ada Lovelace in 1843."),
    ("When did the bridge open?", "It opened in May 1883 after fourteen years of building. " * 6),
    ("What is measured?", "Temperature, pressure and humidity are measured every hour."),
    ("Where is the lake?", "The lake lies between two hills, north of the old town. " * 25),
)


_TABLE = "embeddings.word_embeddings.weight"


def tensor_for(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same numbers for the same name and shape in every environment: float32 `shape`."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{name}{list(shape)}".encode())))
    # Uniform numbers come straight from the generator's bits, the same in all versions of NumPy.
    centred = rng.random(shape) - 0.5
    if name.endswith("LayerNorm.weight"):
        return (1.0 + 0.5 * centred).astype(np.float32)
    return centred.astype(np.float32)


def tiny_tokens() -> dict[str, np.ndarray]:
    """Three sequences of 9 tokens, the second with 4 of padding, int32 `[3, 9]` each."""
    rng = np.random.Generator(np.random.PCG64(7))
    mask = np.ones((3, 9), np.int32)
    mask[1, 5:] = 0
    return {
        "input_ids": (rng.random((3, 9)) * TINY["vocab_size"]).astype(np.int32) * mask,
        "attention_mask": mask,
        "token_type_ids": (np.arange(9) > 3).astype(np.int32) * mask,
    }


def make_fixtures(out: Path) -> None:
    """Tensor names, shapes and outputs of tiny models of the original implementation, as JSON."""
    import torch
    from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

    inputs = {name: torch.tensor(array) for name, array in tiny_tokens().items()}
    document: dict[str, Any] = {"versions": _versions()}
    for key, kind, labels in (
        ("spans", BertForQuestionAnswering, 2),
        ("classes", BertForSequenceClassification, TINY_CLASSES),
    ):
        model = kind(BertConfig(**TINY, num_labels=labels, attn_implementation="eager")).eval()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        filled = {name: torch.tensor(tensor_for(name, shape)) for name, shape in shapes.items()}
        model.load_state_dict(filled)
        with torch.no_grad():
            outputs = model(**inputs)
            embedding = _embedding(model.bert(**inputs).last_hidden_state, inputs)
        found = {"embedding": embedding}
        found |= {f: outputs[f] for f in ("start_logits", "end_logits", "logits") if f in outputs}
        document[key] = {
            "tensors": {name: list(shape) for name, shape in shapes.items()},
            "outputs": {name: tensor.tolist() for name, tensor in found.items()},
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document) + "\n")


def make_seeded(out: Path) -> None:
    """A checkpoint of BERT-base with a head for spans, whose matrices have BERT's own spread."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForQuestionAnswering

    shapes = BertForQuestionAnswering(BertConfig()).state_dict()
    tensors = {}
    for name, tensor in shapes.items():
        values = tensor_for(name, tuple(tensor.shape))
        factor = 0.08 if values.ndim > 1 else 1.0
        tensors[name] = torch.tensor(values * np.float32(factor))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out)


def run_torch(weights: Path, tokenizer_file: Path, out: Path) -> None:
    """Outputs of real weights in the original implementation, in float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForQuestionAnswering, BertModel

    torch.set_num_threads(1)
    inputs = {name: torch.tensor(rows) for name, rows in _tokens(tokenizer_file).items()}
    state = {}
    for name, tensor in load_file(weights).items():
        for short, full in RENAME:
            name = full + name.removeprefix(short) if name.startswith(short) else name
        state[name] = tensor.float()
    spans = "qa_outputs.weight" in state
    width = state["bert.embeddings.word_embeddings.weight" if spans else _TABLE].shape[1]
    layers = 1 + max(int(n.split("layer.")[1].split(".")[0]) for n in state if "layer." in n)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        attn_implementation="eager",
    )
    model = BertForQuestionAnswering(config) if spans else BertModel(config)
    report = model.load_state_dict(state, strict=False)
    unused = [n for n in report.unexpected_keys if "pooler" not in n and "position_ids" not in n]
    if report.missing_keys or unused:
        raise SystemExit(f"the weights do not fit: missing {report.missing_keys}, unused {unused}")
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    if spans:
        found = {"start": outputs.start_logits, "end": outputs.end_logits}
    else:
        found = {"embedding": _embedding(outputs.last_hidden_state, inputs)}
    arrays = {name: tensor.numpy() for name, tensor in found.items()}
    arrays |= {name: tensor.numpy().astype(np.int32) for name, tensor in inputs.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, **arrays, versions=json.dumps(_versions()))


def compare(weights: Path, reference: Path) -> list[dict]:
    """The largest absolute difference of every output from the reference."""
    import jax

    from jaxrmils.zoo import BERT_BASE, MINILM_L6, BertForEmbedding, BertForSpans, import_bert
    from jaxrmils.zoo.importing import load_state_dict

    saved = np.load(reference)
    spans = "start" in saved
    state = load_state_dict(_data(weights))
    widths = {t.shape[1] for n, t in state.items() if n.endswith("word_embeddings.weight")}
    config = BERT_BASE if widths == {BERT_BASE.hidden_size} else MINILM_L6
    module = (BertForSpans if spans else BertForEmbedding)(config)
    variables = import_bert(state, module, rename=_rename_patterns())
    tokens = {name: saved[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    found = jax.jit(lambda variables, tokens: module.apply(variables, **tokens))(variables, tokens)
    named = dict(zip(("start", "end"), found, strict=True)) if spans else {"embedding": found}
    # What stands at padding means nothing, in either implementation.
    real = tokens["attention_mask"] > 0 if spans else slice(None)
    return [
        {
            "weights": str(weights),
            "output": name,
            "shape": list(output.shape),
            "largest": float(np.abs(saved[name][real]).max()),
            "difference": float(np.abs(saved[name] - np.asarray(output))[real].max()),
            "reference": json.loads(str(saved["versions"])),
        }
        for name, output in named.items()
    ]


def write_comparison(weights: list[Path], references: list[Path], out: Path) -> None:
    """The differences of all weight files, as JSON and markdown."""
    from results_file import write_table

    rows = [row for pair in zip(weights, references, strict=True) for row in compare(*pair)]
    lines = [
        "| weights | output | shape | largest absolute value | largest absolute difference |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(
            f"| {row['weights']} | {row['output']} | {shape} | {row['largest']:.3f} "
            f"| {row['difference']:.1e} |"
        )
    made_with = ", ".join(f"{name} {found}" for name, found in rows[0]["reference"].items())
    write_table(out, rows, [*lines, "", f"Reference: {made_with}; float32, eager attention."])


def answer_questions(
    weights: Path, tokenizer: Path, questions: Path, limit: int | None, out: Path
) -> None:
    """Exact match and F1 of the port on questions in SQuAD's form, as JSON and markdown."""
    import jax
    from results_file import write_table

    from jaxrmils.data import load_squad, load_tokenizer, squad_metrics, squad_predictions
    from jaxrmils.zoo import MINILM_L6, BertForSpans, import_bert, span_cross_entropy
    from jaxrmils.zoo.importing import load_state_dict

    squad = load_squad(_data(questions), load_tokenizer(_data(tokenizer)), limit=limit)
    module = BertForSpans(MINILM_L6)
    variables = import_bert(load_state_dict(_data(weights)), module, rename=_rename_patterns())

    @jax.jit
    def run(variables: Any, inputs: Any, targets: Any) -> Any:
        logits = module.apply(variables, **inputs)
        return logits, span_cross_entropy(logits, targets)

    results = [run(variables, *batch) for batch in squad.dataset.batches(16)]
    (start, end), loss = jax.tree.map(lambda *parts: np.concatenate(parts), *results)
    scores = squad_metrics(squad, squad_predictions(squad, start, end))
    row = {
        "weights": str(weights),
        "questions": len(scores.questions),
        "windows": len(squad.dataset),
        "exact_match": scores.exact_match,
        "f1": scores.mean_f1,
        "loss": float(loss.mean()),
    }
    lines = [
        "| weights | questions | windows of 384 tokens | exact match | F1 | mean loss (nats) |",
        "|---|---|---|---|---|---|",
        f"| {weights} | {row['questions']} | {row['windows']} | {row['exact_match']:.2f} "
        f"| {row['f1']:.2f} | {row['loss']:.4f} |",
    ]
    write_table(out, [row], lines)


def _rename_patterns() -> list[tuple[str, str]]:
    return [("^" + short.replace(".", "[.]"), full) for short, full in RENAME]


def _tokens(tokenizer_file: Path) -> dict[str, list[list[int]]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(384)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(TEXTS))
    return {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "token_type_ids": [encoding.type_ids for encoding in encodings],
    }


def _embedding(hidden: Any, inputs: dict[str, Any]) -> Any:
    """sentence-transformers' mean pooling and normalisation, in PyTorch."""
    import torch

    mask = inputs["attention_mask"][..., None].float()
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, p=2, dim=1)


def _data(path: Path) -> Path:
    return Path(os.environ.get("JAXRMILS_DATA", ".")) / path


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers", "numpy", "tokenizers")}
    return {"python": sys.version.split()[0], **found}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fixtures = commands.add_parser("fixtures", help="outputs of tiny models, for the tests")
    fixtures.add_argument("--out", type=Path, required=True)
    seeded = commands.add_parser("seeded", help="a checkpoint of BERT-base with seeded weights")
    seeded.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    run = commands.add_parser("torch", help="outputs of real weights in PyTorch")
    run.add_argument("--weights", type=Path, required=True)
    run.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    run.add_argument("--out", type=Path, required=True, help="an .npz file")
    against = commands.add_parser("compare", help="largest differences of the Flax port")
    against.add_argument("--weights", type=Path, required=True, nargs="+")
    against.add_argument("--reference", type=Path, required=True, nargs="+")
    against.add_argument("--out", type=Path, required=True, help="the table, without a suffix")
    answers = commands.add_parser("answers", help="exact match and F1 of the Flax port")
    answers.add_argument("--weights", type=Path, required=True)
    answers.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    answers.add_argument("--questions", type=Path, required=True, help="in SQuAD's JSON form")
    answers.add_argument("--limit", type=int, help="only the first so many questions")
    answers.add_argument("--out", type=Path, required=True, help="the table, without a suffix")
    args = parser.parse_args()
    if args.command == "fixtures":
        make_fixtures(args.out)
    elif args.command == "seeded":
        make_seeded(args.out)
    elif args.command == "torch":
        run_torch(_data(args.weights), _data(args.tokenizer), args.out)
    elif args.command == "compare":
        write_comparison(args.weights, args.reference, args.out)
    else:
        answer_questions(args.weights, args.tokenizer, args.questions, args.limit, args.out)


if __name__ == "__main__":
    main()
