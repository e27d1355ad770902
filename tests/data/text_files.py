"""A little vocabulary, and files in the forms that the readers take."""

import json

from jaxrmils.data import load_tokenizer

WORDS = "the a who wrote report was written by ada in paris where is lake ##s north of town old"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *"0123456789.,?"]


def write_vocabulary(folder):
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path


def tiny_tokenizer(folder):
    return load_tokenizer(write_vocabulary(folder))


def ids(text):
    """Tokens of words that are separated by blanks."""
    return [VOCABULARY.index(word) for word in text.split()]


def question(name, text, *answers):
    """A question with `(text, start)` answers."""
    found = [{"text": answer, "answer_start": start} for answer, start in answers]
    return {"id": name, "question": text, "answers": found}


def write_squad(folder, *paragraphs):
    """A file of `(context, questions)` paragraphs, the first two in one article."""
    parts = [{"context": context, "qas": questions} for context, questions in paragraphs]
    path = folder / "squad.json"
    articles = [
        {"title": "one", "paragraphs": parts[:2]},
        {"title": "two", "paragraphs": parts[2:]},
    ]
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return path
