"""Fine-tunes a BERT encoder: for answers in SQuAD's form, or as a classifier of texts.

    python experiments/finetune_bert.py squad --encoder E.safetensors --tokenizer T.json \\
        --train train-v1.1.json --test dev-v1.1.json --out weights.safetensors --results R
    python experiments/finetune_bert.py classify --encoder E.safetensors --tokenizer T.json \\
        --train train.csv --test test.csv --out weights.safetensors --results R

`squad` trains the encoder and a new span head; `--train` may also be `NAME.context`, the first of
the files NAME.{context,question,answer,span} with one example a line, tokens separated by blanks,
and the answer's first and last token. Windows of a paragraph that do not hold the answer are left
out. `classify` trains a new classifier on the mean of the tokens' vectors, by default alone
(`--train-encoder` trains all). AdamW, linear warmup and decay, gradients clipped at norm 1, no
dropout. `--group-lengths` makes batches of texts of similar length and cuts their padding: half
the work where windows of 384 tokens hold paragraphs of 150. The weights are saved under Hugging
Face's names and load in the tasks "squad" and "texts".
Relative paths of weights and data are looked for in the folder that the environment variable
JAXRMILS_DATA names.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from results_file import write_table

from jaxrmils.data import (
    DataError,
    Dataset,
    Squad,
    load_squad,
    load_text_csv,
    load_tokenizer,
    squad_metrics,
    squad_predictions,
)
from jaxrmils.data.tables import read_columns
from jaxrmils.graph import from_linen
from jaxrmils.progress import Progress, bars, silent
from jaxrmils.zoo import (
    BertForClassification,
    BertForEmbedding,
    BertForSpans,
    cross_entropy,
    import_bert,
    load_state_dict,
    span_cross_entropy,
)
from jaxrmils.zoo.bert_checkpoint import encoder_config, save_bert
from jaxrmils.zoo.text_task import text_columns

Apply = Callable[[Any, Any], Any]
BUCKET = 16  # tokens: texts are cut to multiples of it, so that few programs are compiled
STEP_BUCKET = 32  # as BUCKET, of steps, whose programs take longer to compile
POOL = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        epochs: passes over the examples.
        batch_size: examples in a step.
        learning_rate: the peak.
        warmup: share of the steps until the peak, from where the rate falls to 0.
        weight_decay: of kernels and embeddings, not of biases and normalisations.
        seed: of the order of the examples.
        steps: stop after so many steps, which the schedule then spans; all epochs by default.
        group_lengths: batches of texts of similar length, cut to their longest. Every epoch's
            order is random; pools of `POOL` batches are sorted by length and their batches taken
            in random order. The loss of a span is then over fewer positions of padding.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0
    steps: int | None = None
    group_lengths: bool = False


def fit(
    apply: Apply,
    params: Any,
    dataset: Dataset,
    loss: Callable[[Any, Any], Any],
    settings: Settings,
    progress: Progress = silent,
) -> tuple[Any, np.ndarray, float]:
    """Trains parameters on a data set.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the parameters to start from, a pytree of float32 arrays.
        dataset: the examples.
        loss: `loss(outputs, targets) -> [batch]`.
        settings: see there.
        progress: draws a bar over the steps.

    Returns:
        The trained parameters, every step's mean loss, float32 `[steps]`, and the median seconds of
        a step.

    Raises:
        DataError: there are fewer examples than in a batch, or the loss is not finite.
    """
    per_epoch = len(dataset) // settings.batch_size
    steps = min(settings.epochs * per_epoch, settings.steps or settings.epochs * per_epoch)
    if steps < 1:
        raise DataError(
            f"{len(dataset)} examples make no batch of {settings.batch_size} in "
            f"{settings.epochs} epochs; lower batch_size or bring more examples"
        )
    warmup = int(settings.warmup * steps)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, settings.learning_rate, warmup),
            optax.linear_schedule(settings.learning_rate, 0.0, steps - warmup),
        ],
        [warmup],
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, weight_decay=settings.weight_decay, mask=_decayed),
    )

    @jax.jit
    def update(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
        value, gradients = jax.value_and_grad(
            lambda params: loss(apply(params, inputs), targets).mean()
        )(params)
        # optax raises a Python float to an int32 step count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses, seconds = optimizer.init(params), [], []
    lengths = dataset.inputs["attention_mask"].sum(axis=1) if settings.group_lengths else None
    rows = batches_of(len(dataset), settings, lengths)[:steps]
    for chosen in progress(rows, "fine-tuning", steps):
        begun = time.perf_counter()
        inputs, targets = _rows(dataset, chosen)
        if lengths is not None:
            longest = -(-int(lengths[chosen].max()) // STEP_BUCKET) * STEP_BUCKET
            inputs = {name: array[:, :longest] for name, array in inputs.items()}
        params, state, value = update(params, state, inputs, targets)
        losses.append(float(value))
        seconds.append(time.perf_counter() - begun)
    if not np.isfinite(losses).all():
        raise DataError(f"the loss became {losses[-1]} within {steps} steps; lower learning_rate")
    return params, np.array(losses, np.float32), float(np.median(seconds))


def batches_of(examples: int, settings: Settings, lengths: np.ndarray | None) -> np.ndarray:
    """The examples of every step of all epochs.

    Args:
        examples: how many there are.
        settings: `seed`, `epochs` and `batch_size` count.
        lengths: tokens of every example, int `[examples]`, to make batches of similar length; None
            for random ones.

    Returns:
        int `[steps, batch_size]`. No example is twice in an epoch; what fills no batch is left out.
    """
    random, size = np.random.default_rng(settings.seed), settings.batch_size
    epochs = []
    for _ in range(settings.epochs):
        order = random.permutation(examples)
        if lengths is not None:
            pools = np.split(order, range(POOL * size, examples, POOL * size))
            order = np.concatenate([pool[np.argsort(-lengths[pool])] for pool in pools])
        rows = order[: examples // size * size].reshape(-1, size)
        epochs.append(rows if lengths is None else random.permutation(rows))
    return np.concatenate(epochs)


def _decayed(params: Any) -> Any:
    """True for kernels and embeddings."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _rows(dataset: Dataset, chosen: np.ndarray) -> tuple[Any, Any]:
    return jax.tree.map(lambda array: array[chosen], (dataset.inputs, dataset.targets))


def outputs_of(
    apply: Apply, params: Any, dataset: Dataset, batch_size: int, progress: Progress = silent
) -> Any:
    """A model's outputs on all examples, in NumPy, the first axis counting examples."""
    run = jax.jit(apply)
    batches = list(dataset.batches(min(batch_size, len(dataset))))
    outputs = [run(params, x) for x, _ in progress(batches, "evaluating", len(batches))]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def read_slice(prefix: Path) -> dict[str, Any]:
    """Files of tokens as a document of SQuAD's form.

    Args:
        prefix: the path without the suffixes .context, .question, .answer and .span.

    Returns:
        The document; examples with the same context make one paragraph. Lines whose span is empty,
        its last token before its first, hold no answer and are left out.

    Raises:
        DataError: a file is missing, they differ in their number of lines, or a span lies outside.
    """
    files = [prefix.with_suffix(suffix) for suffix in (".context", ".question", ".span")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{prefix.parent} has no {', '.join(missing)}")
    contexts, questions, spans = (file.read_text(encoding="utf-8").split("\n") for file in files)
    if len({len(contexts), len(questions), len(spans)}) != 1:
        raise DataError(
            f"{prefix}: {len(contexts)} contexts, {len(questions)} questions and {len(spans)} "
            "spans; expected as many of each, one a line"
        )
    paragraphs: dict[str, list[dict]] = {}
    for line, (context, question, span) in enumerate(zip(contexts, questions, spans, strict=True)):
        if not context:
            continue
        tokens = context.split(" ")
        first, last = map(int, span.split())
        if first == last + 1:
            continue
        if not 0 <= first <= last < len(tokens):
            raise DataError(
                f"{prefix}, line {line + 1}: the span {span} is not in {len(tokens)} tokens"
            )
        start = len(" ".join(tokens[:first])) + (first > 0)
        answer = {"text": " ".join(tokens[first : last + 1]), "answer_start": start}
        entry = {"id": f"line {line + 1}", "question": question, "answers": [answer]}
        paragraphs.setdefault(context, []).append(entry)
    parts = [{"context": context, "qas": entries} for context, entries in paragraphs.items()]
    return {"data": [{"paragraphs": parts}]}


def load_training(path: Path, tokenizer: Any, max_length: int, doc_stride: int) -> Dataset:
    """Windows that hold their question's answer, of a SQuAD file or of files of tokens."""
    options: dict[str, Any] = {"max_length": max_length, "doc_stride": doc_stride}
    if path.suffix == ".context":
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / "slice.json"
            converted.write_text(json.dumps(read_slice(path.with_suffix(""))))
            squad = load_squad(converted, tokenizer, **options)
    else:
        squad = load_squad(path, tokenizer, **options)
    return squad.dataset.take(np.flatnonzero(squad.dataset.targets["end"] > 0))


def answer_scores(squad: Squad, logits: Any) -> dict[str, float]:
    """Exact match and F1 in percent, and the mean loss in nats."""
    scores = squad_metrics(squad, squad_predictions(squad, *logits))
    loss = span_cross_entropy(jax.tree.map(jnp.asarray, logits), squad.dataset.targets)
    return {
        "exact_match": scores.exact_match,
        "f1": scores.mean_f1,
        "loss": float(loss.mean()),
    }


def finetune_squad(args: argparse.Namespace, settings: Settings) -> None:
    """The subcommand `squad`."""
    tokenizer = load_tokenizer(_data(args.tokenizer))
    training = load_training(_data(args.train), tokenizer, args.max_length, args.doc_stride)
    squad = load_squad(
        _data(args.test),
        tokenizer,
        max_length=args.test_length,
        windows=False,
        limit=args.test_limit,
    )
    module = BertForSpans(encoder_config(args.model))
    state = with_new_head(load_state_dict(_data(args.encoder)), "qa_outputs", 2, settings.seed)
    apply, params = from_linen(module, import_bert(state, module))
    untrained = answer_scores(squad, outputs_of(apply, params, squad.dataset, 16, bars))
    params, losses, seconds = fit(apply, params, training, span_cross_entropy, settings, bars)
    save_bert(params, _data(args.out))
    trained = answer_scores(squad, outputs_of(apply, params, squad.dataset, 16, bars))
    row = {
        "windows": len(training),
        "steps": len(losses),
        "seconds_per_step": seconds,
        "first_losses": float(losses[:20].mean()),
        "last_losses": float(losses[-20:].mean()),
        "questions": len(squad.questions),
        "untrained": untrained,
        "trained": trained,
    }
    lines = [
        "| | exact match | F1 | loss (nats) |",
        "|---|---|---|---|",
        *(
            f"| {name} | {found['exact_match']:.2f} | {found['f1']:.2f} | {found['loss']:.4f} |"
            for name, found in (("new head", untrained), ("fine-tuned", trained))
        ),
        "",
        f"On {len(squad.questions)} questions, windows of {args.test_length} tokens. "
        f"{len(losses)} steps of {seconds:.2f} s on {len(training)} windows of "
        f"{args.max_length} tokens; training loss {row['first_losses']:.3f} in the first 20 steps, "
        f"{row['last_losses']:.3f} in the last 20.",
    ]
    write_table(args.results, [row], lines)


def finetune_classifier(args: argparse.Namespace, settings: Settings) -> None:
    """The subcommand `classify`."""
    tokenizer, begun = load_tokenizer(_data(args.tokenizer)), time.perf_counter()
    text, label = text_columns(_data(args.train))
    classes = sorted(set(read_columns(_data(args.train), [label])[label]))
    options = {
        "text": text,
        "label": label,
        "tokenizer": tokenizer,
        "max_length": args.max_length,
        "classes": classes,
    }
    training, test = (load_text_csv(_data(path), **options) for path in (args.train, args.test))
    config, encoder = encoder_config(args.model), load_state_dict(_data(args.encoder))
    module = BertForClassification(config, len(classes), "mean")
    state = with_new_head(encoder, "classifier", len(classes), settings.seed)
    variables = import_bert(state, module)
    if args.train_encoder:
        apply, params = from_linen(module, variables)
        params, losses, _ = fit(apply, params, training, cross_entropy, settings, bars)
    else:
        vectors = text_vectors(config, variables, training)
        head = variables["params"]["classifier"]
        probe = Dataset(vectors, training.targets)
        head, losses, _ = fit(_linear, head, probe, cross_entropy, settings, bars)
        params = {"params": {**variables["params"], "classifier": head}}
    save_bert(params, _data(args.out), classes=classes)
    logits = _linear(params["params"]["classifier"], text_vectors(config, params, test))
    correct = np.argmax(logits, axis=-1) == test.targets
    row = {
        "texts": len(training),
        "classes": len(classes),
        "trained": "all" if args.train_encoder else "classifier",
        "steps": len(losses),
        "seconds": time.perf_counter() - begun,
        "test_texts": len(test),
        "accuracy": float(correct.mean()),
        "loss": float(cross_entropy(logits, jnp.asarray(test.targets)).mean()),
    }
    lines = [
        "| trained | texts | classes | steps | seconds | test texts | accuracy | loss (nats) |",
        "|---|---|---|---|---|---|---|---|",
        f"| {row['trained']} | {row['texts']} | {row['classes']} | {row['steps']} "
        f"| {row['seconds']:.0f} | {row['test_texts']} | {100 * row['accuracy']:.2f} % "
        f"| {row['loss']:.4f} |",
    ]
    write_table(args.results, [row], lines)


def text_vectors(config: Any, variables: Any, dataset: Dataset, batch_size: int = 128) -> Any:
    """What the classifier of a `BertForClassification` with mean features reads.

    Texts of similar length share a batch, so that little padding is computed.

    Returns:
        float32 `[texts, hidden_size]`, in the order of the data set.
    """
    module = BertForEmbedding(config)
    encoder = {"params": {"bert": variables["params"]["bert"]}}
    run = jax.jit(lambda variables, tokens: module.apply(variables, **tokens))
    lengths = dataset.inputs["attention_mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    vectors = np.zeros((len(dataset), config.hidden_size), np.float32)
    batches = np.split(order, range(batch_size, len(order), batch_size))
    for chosen in bars(batches, "reading texts", len(batches)):
        length = -(-int(lengths[chosen].max()) // BUCKET) * BUCKET
        tokens = {name: array[chosen, :length] for name, array in dataset.inputs.items()}
        vectors[chosen] = run(encoder, tokens)
    return vectors


def with_new_head(encoder: dict[str, Any], head: str, outputs: int, seed: int) -> dict[str, Any]:
    """An encoder's tensors with a head of BERT's initialisation, normal with deviation 0.02.

    Raises:
        DataError: the checkpoint is no encoder.
    """
    tables = [tensor for name, tensor in encoder.items() if "word_embeddings" in name]
    if len(tables) != 1:
        raise DataError("the encoder's checkpoint has no word embeddings; expected a BERT encoder")
    shape = (outputs, tables[0].shape[1])
    weight = np.random.default_rng(seed).normal(scale=0.02, size=shape).astype(np.float32)
    return {
        **encoder,
        f"{head}.weight": weight,
        f"{head}.bias": np.zeros(outputs, np.float32),
    }


def _linear(head: Any, vectors: Any) -> Any:
    return jnp.asarray(vectors) @ head["kernel"] + head["bias"]


def _data(path: Path) -> Path:
    return Path(os.environ.get("JAXRMILS_DATA", ".")) / path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    squad = commands.add_parser("squad", help="encoder and span head on a SQuAD file")
    classify = commands.add_parser("classify", help="a classifier of texts in a CSV file")
    for command in (squad, classify):
        command.add_argument("--model", default="minilm_l6", help="minilm_l6 or bert_base")
        command.add_argument("--encoder", type=Path, required=True, help="the encoder's weights")
        command.add_argument("--tokenizer", type=Path, required=True)
        command.add_argument("--train", type=Path, required=True)
        command.add_argument("--test", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True, help="a .safetensors file")
        command.add_argument("--results", type=Path, required=True, help="without a suffix")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--steps", type=int, help="stop after so many steps")
        command.add_argument(
            "--group-lengths", action="store_true", help="batches of similar length, less padding"
        )
    _add_training(squad, epochs=3, batch_size=8, learning_rate=1e-4, max_length=256)
    squad.add_argument("--doc-stride", type=int, default=64, help="tokens that windows share")
    squad.add_argument("--test-length", type=int, default=384, help="tokens of a test window")
    squad.add_argument("--test-limit", type=int, help="only the first so many test questions")
    _add_training(classify, epochs=60, batch_size=512, learning_rate=0.05, max_length=64)
    classify.add_argument("--train-encoder", action="store_true", help="train all, not the head")
    args = parser.parse_args()
    names = ("epochs", "batch_size", "learning_rate", "seed", "steps", "group_lengths")
    if args.command == "classify" and args.group_lengths and not args.train_encoder:
        parser.error("--group-lengths needs --train-encoder: a classifier alone reads no tokens")
    settings = Settings(**{name: getattr(args, name) for name in names})
    if args.command == "squad":
        finetune_squad(args, settings)
    else:
        finetune_classifier(args, settings)


def _add_training(command: argparse.ArgumentParser, **defaults: Any) -> None:
    for name, value in defaults.items():
        option = "--" + name.replace("_", "-")
        command.add_argument(option, type=type(value), default=value)


if __name__ == "__main__":
    main()
