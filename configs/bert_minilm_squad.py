"""MiniLM-L6 (6 layers, 384 wide) fine-tuned for SQuAD's questions, on XQuAD's English part.

jaxrmils quantize --config configs/bert_minilm_squad.py --out runs/minilm_squad \\
  --config.model.weights=minilm_qa.safetensors --config.model.tokenizer=tokenizer.json \\
  --config.data.files=xquad.en.json

Needed: XQuAD (https://github.com/google-deepmind/xquad, `xquad.en.json`: 1,190 questions about 240
paragraphs of SQuAD v1.1's development data), the tokenizer of all-MiniLM-L6-v2, and weights with
the tensor names of Hugging Face's `BertForQuestionAnswering`, which this makes of the published
encoder and SQuAD's training data:

python experiments/finetune_bert.py squad --encoder model.safetensors --tokenizer tokenizer.json \\
  --train train-v1.1.json --test xquad.en.json --max-length 384 --doc-stride 128 --group-lengths \\
  --out minilm_qa.safetensors --results runs/minilm_qa
"""

from jaxrmils.cli.defaults import base_config


def get_config():
    """The config; every field can be overridden from the command line."""
    config = base_config()
    config.task = "squad"
    config.model.name = "minilm_l6"
    config.model.max_length = 384
    config.batch_size = 10
    # Paragraphs, of about 5 questions each.
    config.splits.ranges = 20
    config.splits.selection = 60
    config.splits.confirmation = 70
    config.splits.test = 90
    config.policy.name = "lossless"
    # Activations with a grid for every token: one static grid for all tokens costs 0.06 nats. The
    # embedding tables have weights alone. No int4: in the word embeddings alone it costs 0.1 nats.
    config.policy.formats = ("w8a8d", "w8")
    config.verify.margin = 0.03
    return config
