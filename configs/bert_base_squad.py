"""BERT-base (uncased) fine-tuned for SQuAD v1.1, on its development data.

jaxrmils quantize --config configs/bert_base_squad.py --out runs/bert_base_squad \\
  --config.model.weights=model.safetensors --config.model.tokenizer=vocab.txt \\
  --config.data.files=dev-v1.1.json

Needed: SQuAD v1.1's `dev-v1.1.json` (10,570 questions about 2,067 paragraphs), and any checkpoint
with the tensor names of Hugging Face's `BertForQuestionAnswering` and its tokenizer (`vocab.txt` or
`tokenizer.json`). Meant for an accelerator; `--config.data.examples=400` with smaller splits tries
it on 400 paragraphs. SQuAD's training data may set the ranges, so that no development question is
spent on them: `--config.data.calibration=train-v1.1.json
--config.data.calibration_trained_on=True`.

TFDS's `squad` in the ArrayRecord format does as well, read without TensorFlow:
`--config.data.name=squad --config.data.data_dir=FOLDER` in place of the file.
"""

from jaxrmils.cli.defaults import base_config


def get_config():
    """The config; every field can be overridden from the command line."""
    config = base_config()
    config.task = "squad"
    config.model.name = "bert_base"
    config.model.max_length = 384
    config.batch_size = 8
    # Paragraphs, of about 5 questions each.
    config.splits.ranges = 40
    config.splits.selection = 300
    config.splits.confirmation = 600
    config.splits.test = 1_000
    config.policy.name = "lossless"
    config.policy.formats = ("w8a8", "w4a8")
    return config
