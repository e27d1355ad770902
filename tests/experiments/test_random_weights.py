"""What stands in for ImageNet, SQuAD and their weights can be read as they are."""

import sys

import numpy as np
import pytest
import random_weights
from image_files import write_images
from zoo.text_tasks import TINY, write_questions

from jaxrmils.data import load_tfds, read_tfds
from jaxrmils.zoo import BertForSpans, bert_checkpoint, reference
from jaxrmils.zoo.bert_checkpoint import load_bert
from jaxrmils.zoo.importing import load_state_dict


@pytest.fixture
def written(tmp_path, monkeypatch):
    photos = write_images(tmp_path / "photos", 5)
    names = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    rows = ["file,label", *(f"{name},{number + 7}" for number, name in enumerate(names)), "gone,1"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    monkeypatch.setitem(bert_checkpoint.ENCODERS, "bert_base", TINY)
    monkeypatch.setattr(random_weights, "NETWORKS", ("cifar_resnet20",))
    out = tmp_path / "random"
    command = ["random_weights.py", str(out), "--photos", str(photos)]
    command += ["--labels", str(tmp_path / "labels.csv"), "--examples", "3", "--paragraphs", "2"]
    command += ["--questions", str(write_questions(tmp_path / "questions", 4))]
    monkeypatch.setattr(sys, "argv", command)
    random_weights.main()
    return out


def test_data_and_weights_are_read_back(written):
    found = load_tfds(
        "imagenet2012", "validation", data_dir=written, inputs="image", targets="label"
    )
    assert len(found) == 3 and set(np.asarray(found.targets)) <= set(range(7, 12))
    features = ("context", "answers/text")
    questions = read_tfds("some_questions", "validation", data_dir=written, features=features)
    assert len(set(questions["context"])) == 2 and len(questions["answers/text"]) == 4
    network = reference("cifar_resnet20")
    params = network.from_checkpoint(written / "cifar_resnet20.safetensors")["params"]
    kernel = np.asarray(params["conv1"]["kernel"])
    # He's initial kernels: outputs as large as inputs.
    assert kernel.std() == pytest.approx(np.sqrt(2 / np.prod(kernel.shape[:-1])), rel=0.2)
    module = BertForSpans(TINY)
    load_bert(load_state_dict(written / "bert_base.safetensors"), module, "qa_outputs")
