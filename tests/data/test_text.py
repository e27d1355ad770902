"""Texts become BERT's tokens, rows of a table keep their labels."""

import builtins

import numpy as np
import pytest
import tokenizers
from text_files import VOCABULARY, ids, tiny_tokenizer, write_vocabulary

from jaxrmils.data import DataError, encode_texts, load_text_csv, load_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    return tiny_tokenizer(tmp_path)


def test_single_texts(tokenizer):
    found = encode_texts(tokenizer, ["The lakes, Ada?", "", "quux [SEP]"], max_length=8)
    expected = [
        ids("[CLS] the lake ##s , ada ? [SEP]"),
        ids("[CLS] [SEP]" + " [PAD]" * 6),
        ids("[CLS] [UNK] [SEP] [SEP]" + " [PAD]" * 4),
    ]
    np.testing.assert_array_equal(found["input_ids"], expected)
    np.testing.assert_array_equal(found["attention_mask"].sum(axis=1), [8, 2, 4])
    assert not found["token_type_ids"].any()
    assert all(array.dtype == np.int32 for array in found.values())


def test_pairs_and_truncation(tokenizer):
    found = encode_texts(tokenizer, ["who wrote"], pairs=["the old report"], max_length=9)
    expected = ids("[CLS] who wrote [SEP] the old report [SEP] [PAD]")
    np.testing.assert_array_equal(found["input_ids"], [expected])
    np.testing.assert_array_equal(found["token_type_ids"], [[0, 0, 0, 0, 1, 1, 1, 1, 0]])
    cut = encode_texts(tokenizer, ["in the old town of paris"], max_length=5)
    np.testing.assert_array_equal(cut["input_ids"], [ids("[CLS] in the old [SEP]")])


def test_a_saved_tokenizer_reads_like_its_vocabulary(tokenizer, tmp_path):
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    saved = load_tokenizer(tmp_path / "tokenizer.json")
    texts = ["who wrote the report?", "ADA"]
    found = encode_texts(saved, texts, max_length=7)
    plain = encode_texts(tokenizer, texts, max_length=7)
    np.testing.assert_array_equal(found["input_ids"], plain["input_ids"])
    # The caller's tokenizer stays as it was.
    assert saved.truncation["max_length"] == 3 and saved.padding["length"] == 64


def test_the_vocabulary_is_read_as_the_library_reads_it(tmp_path):
    path = write_vocabulary(tmp_path)
    text = "Á  lake's report\t(1843), Ada"
    for lowercase in (True, False):
        vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
        reference = tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=lowercase).encode(text)
        found = encode_texts(load_tokenizer(path, lowercase=lowercase), [text], max_length=24)
        assert found["input_ids"][0, : len(reference.ids)].tolist() == reference.ids


def test_labelled_table(tokenizer, tmp_path):
    path = tmp_path / "intents.csv"
    rows = ['"where, ada?",travel,x,test', "the report,work,y,test", "old,travel,x,train"]
    path.write_text("\n".join(["text,intent,author,split", *rows, "paris,travel,x,test"]) + "\n")
    options = {"text": "text", "label": "intent", "tokenizer": tokenizer, "max_length": 6}
    data = load_text_csv(path, **options, group="author", where={"split": "test"})
    assert data.name == "intents"
    assert data.inputs["input_ids"][0].tolist() == ids("[CLS] where , ada ? [SEP]")
    assert data.targets.tolist() == [0, 1, 0] and data.targets.dtype == np.int32
    assert data.groups is not None and data.groups.tolist() == [0, 1, 0]
    named = load_text_csv(path, **options, classes=["work", "play", "travel"], name="mine")
    assert named.targets.tolist() == [2, 0, 2, 2] and named.name == "mine"
    pairs = load_text_csv(path, **options, pair="author", group="intent")
    assert pairs.inputs["token_type_ids"].any()
    assert pairs.groups is not None and pairs.groups.tolist() == pairs.targets.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "class"}, r"no column 'class'; its columns are \['text', 'intent'\]"),
        ({"where": {"intent": "play"}}, r"has 2 rows, and none of them matches \{'intent': 'play'"),
        ({"classes": ["work"]}, r"1 labels are none of the 1 classes: \['travel'\]"),
        ({"classes": ["work", "work"]}, "hold a name twice"),
        ({"max_length": 2}, "max_length is 2 and the special tokens take 2"),
    ],
)
def test_bad_tables(tokenizer, tmp_path, changes, message):
    path = tmp_path / "intents.csv"
    path.write_text("text,intent\nada,work\nparis,travel\n")
    options = {"text": "text", "label": "intent", "tokenizer": tokenizer, "max_length": 6}
    with pytest.raises(DataError, match=message):
        load_text_csv(path, **(options | changes))


def test_a_short_row_is_named(tokenizer, tmp_path):
    path = tmp_path / "intents.csv"
    path.write_text("text,intent\nada,work\nparis\n")
    with pytest.raises(DataError, match="line 3: column 'intent' is missing"):
        load_text_csv(path, text="text", label="intent", tokenizer=tokenizer, max_length=6)


def test_what_is_no_tokenizer(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is no file; expected a tokenizer"):
        load_tokenizer(tmp_path / "vocab.txt")
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer of the tokenizers library"):
        load_tokenizer(bad)
    words = tmp_path / "words.txt"
    words.write_text("\n".join(VOCABULARY[4:]))
    with pytest.raises(DataError, match=r"lacks the tokens \['\[PAD\]', '\[UNK\]'"):
        load_tokenizer(words)
    model = tmp_path / "spiece.model"
    model.write_bytes(b"")
    with pytest.raises(DataError, match="neither a tokenizer"):
        load_tokenizer(model)
    real = builtins.__import__

    def without_tokenizers(name, *args, **kwargs):
        if name == "tokenizers":
            raise ModuleNotFoundError("No module named 'tokenizers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(DataError, match=r"tokenizers library.*jaxrmils\[data\]"):
        load_tokenizer(bad)


def test_a_tokenizer_without_padding(tokenizer):
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<pad>": 1}, unk_token="a"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=r"no token \[PAD\]"):
        encode_texts(bare, ["a"], max_length=3)
    bare.enable_padding(pad_id=1, pad_token="<pad>")
    assert encode_texts(bare, ["a a"], max_length=3)["input_ids"].tolist() == [[0, 0, 1]]
    with pytest.raises(DataError, match="found 0 texts"):
        encode_texts(tokenizer, [], max_length=3)
    with pytest.raises(DataError, match="found 1 texts and 2 second texts"):
        encode_texts(tokenizer, ["a"], pairs=["a", "a"], max_length=9)
