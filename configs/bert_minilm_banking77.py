"""MiniLM-L6 as a classifier of bank customers' questions, on Banking77's test texts.

jaxrmils quantize --config configs/bert_minilm_banking77.py --out runs/banking77 \\
  --config.model.weights=banking77.safetensors --config.model.tokenizer=tokenizer.json \\
  --config.data.files=test.csv

Needed: Banking77 (https://github.com/PolyAI-LDN/task-specific-datasets, `train.csv` and `test.csv`
with the columns text and category), and the published encoder all-MiniLM-L6-v2 with its tokenizer.
A classifier on the frozen encoder gets 93 % of the test texts right; it takes a minute on two CPU
cores:

python experiments/finetune_bert.py classify --encoder model.safetensors \\
  --tokenizer tokenizer.json --train train.csv --test test.csv --out banking77.safetensors \\
  --results runs/banking77_float

Texts that TFDS has prepared do as well, read without TensorFlow: `--config.data.name=NAME
--config.data.split=test --config.data.data_dir=FOLDER` in place of the file, and, unless its
features are called text and label, `--config.data.text_feature` and `--config.data.label_feature`.
"""

from jaxrmils.cli.defaults import base_config


def get_config():
    """The config; every field can be overridden from the command line."""
    config = base_config()
    config.task = "texts"
    config.model.name = "minilm_l6"
    # The longest texts lose their end; most have fewer than 20 tokens.
    config.model.max_length = 64
    config.batch_size = 50
    config.splits.ranges = 250
    config.splits.selection = 600
    config.splits.confirmation = 1_000
    config.splits.test = 1_200
    config.policy.name = "lossless"
    config.policy.formats = ("w8a8", "w4a8")
    return config
