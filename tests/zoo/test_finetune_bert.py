"""The fine-tuning script learns, and the tasks read what it saves."""

import json
import sys
from pathlib import Path

import finetune_bert
import jax
import numpy as np
import pytest
from data.text_files import tiny_tokenizer
from finetune_bert import Settings, batches_of, fit, load_training, read_slice, with_new_head
from safetensors.numpy import load_file, save_file
from text_tasks import (
    CLASSES,
    TINY,
    random_variables,
    some_rows,
    task_config,
    write_questions,
    write_texts,
)

from jaxrmils.data import DataError
from jaxrmils.graph import from_linen
from jaxrmils.zoo import (
    BertForClassification,
    BertForEmbedding,
    BertForSpans,
    import_bert,
    span_cross_entropy,
)
from jaxrmils.zoo.bert_checkpoint import ENCODERS, export_bert, save_bert
from jaxrmils.zoo.squad_task import squad_task
from jaxrmils.zoo.text_task import text_task

FIXTURE = Path(__file__).parent / "fixtures" / "bert_tiny.json"


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """A tiny pretrained encoder, as published: without head."""
    monkeypatch.setitem(ENCODERS, "tiny", TINY)
    monkeypatch.setenv("JAXRMILS_DATA", str(tmp_path))
    save_bert(random_variables(BertForEmbedding(TINY)), tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


def run(monkeypatch, folder, command, *options):
    """The script's command line; returns the row of its results."""
    paths = ["--encoder", "encoder.safetensors", "--tokenizer", "vocab.txt"]
    outs = ["--out", "weights.safetensors", "--results", str(folder / "results")]
    line = ["finetune_bert.py", command, "--model", "tiny", *paths, *outs, *options]
    monkeypatch.setattr(sys, "argv", line)
    finetune_bert.main()
    document = json.loads((folder / "results.json").read_text())
    assert document["command"].startswith("python finetune_bert.py") and document["versions"]
    return document["rows"][0]


def test_training_lowers_the_loss_and_repeats_itself(tmp_path, encoder):
    file = write_questions(tmp_path, 10)
    dataset = load_training(file, tiny_tokenizer(tmp_path), 20, 2)
    module = BertForSpans(TINY)
    state = with_new_head(load_file(encoder), "qa_outputs", 2, seed=0)
    apply, params = from_linen(module, import_bert(state, module))
    settings = Settings(epochs=15, batch_size=4, learning_rate=2e-2, steps=62)
    trained, losses, seconds = fit(apply, params, dataset, span_cross_entropy, settings)
    assert losses.shape == (62,) and seconds > 0
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()
    again, _, _ = fit(apply, params, dataset, span_cross_entropy, settings)
    jax.tree.map(np.testing.assert_array_equal, trained, again)
    with pytest.raises(DataError, match="20 examples make no batch of 21"):
        fit(apply, params, dataset, span_cross_entropy, Settings(1, 21, 1e-3))


@pytest.mark.parametrize(("examples", "batch_size"), [(403, 4), (37, 5), (8, 8)])
def test_batches_of_similar_length(examples, batch_size):
    random = np.random.default_rng(1)
    lengths = random.integers(10, 384, examples)
    settings = Settings(epochs=3, batch_size=batch_size, learning_rate=1e-3)
    grouped, plain = (batches_of(examples, settings, sizes) for sizes in (lengths, None))
    steps = examples // batch_size
    assert grouped.shape == plain.shape == (3 * steps, batch_size)
    for epoch in np.split(grouped, 3):
        assert len(np.unique(epoch)) == steps * batch_size
    np.testing.assert_array_equal(grouped, batches_of(examples, settings, lengths))
    if steps > 1:
        assert not np.array_equal(grouped[:steps], grouped[steps : 2 * steps])
        spread = [np.ptp(lengths[rows], axis=1).mean() for rows in (grouped, plain)]
        assert spread[0] < 0.3 * spread[1]
        # A batch's place in its epoch does not follow its length.
        means = lengths[grouped[:steps]].mean(axis=1)
        assert abs(np.corrcoef(means, np.arange(steps))[0, 1]) < 0.7


def test_steps_read_no_more_padding_than_they_must(tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(finetune_bert, "STEP_BUCKET", 2)
    file = write_questions(tmp_path, 10)
    dataset = load_training(file, tiny_tokenizer(tmp_path), 20, 2)
    lengths = dataset.inputs["attention_mask"].sum(axis=1)
    dataset = dataset.take(np.flatnonzero(lengths <= 17))
    longest, size = int(lengths[lengths <= 17].max()), len(dataset)
    assert size > 5
    module = BertForSpans(TINY)
    state = with_new_head(load_file(encoder), "qa_outputs", 2, seed=0)
    apply, params = from_linen(module, import_bert(state, module))
    for grouped, width in ((False, 20), (True, longest + longest % 2)):
        settings = Settings(1, size, 1e-3, group_lengths=grouped)
        _, losses, _ = fit(apply, params, dataset, span_cross_entropy, settings)
        inputs = {name: array[:, :width] for name, array in dataset.inputs.items()}
        loss = span_cross_entropy(apply(params, inputs), dataset.targets).mean()
        np.testing.assert_allclose(losses, [loss], rtol=1e-5)


def test_squad_on_files_of_tokens(tmp_path, monkeypatch, encoder):
    contexts = ["the report was written by ada in paris .", "the lake is north of the town"] * 6
    (tmp_path / "some.context").write_text("\n".join(contexts) + "\n")
    (tmp_path / "some.question").write_text("\n".join(["where ?"] * 12) + "\n")
    # The last line holds no answer.
    (tmp_path / "some.span").write_text("\n".join([*["6 7", "3 6"] * 5, "6 7", "4 3"]) + "\n")
    paragraphs = read_slice(tmp_path / "some")["data"][0]["paragraphs"]
    assert [len(part["qas"]) for part in paragraphs] == [6, 5]
    answer = paragraphs[1]["qas"][0]["answers"][0]
    assert answer == {"text": "north of the town", "answer_start": 12}
    config = task_config(tmp_path, "squad", write_questions(tmp_path, 12))
    options = ["--train", "some.context", "--test", "squad.json", "--max-length", "16"]
    options += ["--doc-stride", "2", "--test-length", "20", "--batch-size", "4", "--epochs", "2"]
    options += ["--learning-rate", "0.02"]
    row = run(monkeypatch, tmp_path, "squad", *options)
    assert (row["windows"], row["steps"], row["questions"]) == (11, 4, 24)
    task = squad_task(config, architecture=TINY)
    logits = task.apply(task.load_params(), task.dataset.inputs)
    scores = task.metrics(logits, np.arange(24))
    trained = row["trained"]
    assert trained["exact_match"] == pytest.approx(100 * scores["EM"].mean())
    assert trained["f1"] == pytest.approx(100 * scores["F1"].mean())
    loss = span_cross_entropy(logits, task.dataset.targets).mean()
    assert trained["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert abs(trained["loss"] - row["untrained"]["loss"]) > 1e-2
    (tmp_path / "some.span").write_text("\n".join(["6 6"] * 11 + ["3 7"]) + "\n")
    with pytest.raises(DataError, match=r"line 12: the span 3 7 is not in 7 tokens"):
        read_slice(tmp_path / "some")
    (tmp_path / "some.span").write_text("6 7\n")
    with pytest.raises(DataError, match="13 contexts, 13 questions and 2 spans"):
        read_slice(tmp_path / "some")
    with pytest.raises(DataError, match=r"has no other\.context, other\.question, other\.span"):
        read_slice(tmp_path / "other")


@pytest.mark.parametrize("trained", ["classifier", "all"])
def test_a_classifier_of_texts(tmp_path, monkeypatch, encoder, trained, capsys):
    texts = write_texts(tmp_path, some_rows(30))
    config = task_config(tmp_path, "texts", texts)
    options = ["--train", "texts.csv", "--test", "texts.csv", "--max-length", "20"]
    options += ["--batch-size", "10", "--epochs", "2"]
    if trained == "all":
        options += ["--train-encoder", "--group-lengths"]
    else:
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, "classify", *options, "--group-lengths")
        assert "--group-lengths needs --train-encoder" in capsys.readouterr().err
    row = run(monkeypatch, tmp_path, "classify", *options)
    assert (row["trained"], row["classes"], row["texts"], row["steps"]) == (trained, 3, 30, 6)
    before, after = load_file(encoder), load_file(tmp_path / "weights.safetensors")
    same = all(np.array_equal(before[name], after[name]) for name in before)
    assert same == (trained == "classifier")
    # The task knows the classes by name, and pads to another length.
    task = text_task(config, architecture=TINY)
    names = np.array(sorted(CLASSES))[task.dataset.targets]
    assert names.tolist() == [name for _, name in some_rows(30)]
    logits = task.apply(task.load_params(), task.dataset.inputs)
    assert row["accuracy"] == pytest.approx(task.metrics(logits, np.arange(30))["Acc@1"].mean())
    assert row["loss"] == pytest.approx(float(task.loss(logits, task.dataset.targets).mean()))


@pytest.mark.parametrize("kind", ["spans", "classes"])
def test_saved_names_are_the_published_ones(kind):
    shapes = json.loads(FIXTURE.read_text())[kind]["tensors"]
    sizes = type(TINY)(24, 2, 3, 40, 40, 16)
    module = BertForSpans(sizes) if kind == "spans" else BertForClassification(sizes, 5)
    tensors = export_bert(random_variables(module))
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == shapes
    jax.tree.map(
        np.testing.assert_array_equal, import_bert(tensors, module), random_variables(module)
    )


def test_an_encoder_that_is_none(tmp_path):
    save_file({"weight": np.zeros((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="no word embeddings; expected a BERT encoder"):
        with_new_head(load_file(tmp_path / "x.safetensors"), "classifier", 2, 0)
