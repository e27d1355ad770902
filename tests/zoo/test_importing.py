import sys
import types
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.flax import save_file as save_jax
from safetensors.numpy import save_file

from jaxrmils.zoo import WeightError, import_params, load_state_dict
from jaxrmils.zoo.importing import plain_state_dict


class Small(nn.Module):
    """One of every kind of layer."""

    @nn.compact
    def __call__(self, images, tokens):
        hidden = nn.Conv(4, (3, 5), name="conv")(images)
        hidden = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False, name="grouped")(hidden)
        hidden = nn.BatchNorm(use_running_average=True, name="norm")(hidden).mean((1, 2))
        return nn.Dense(3, name="fc")(hidden + nn.Embed(7, 8, name="embed")(tokens))


IMAGES = np.random.default_rng(1).normal(size=(2, 6, 6, 2)).astype(np.float32)
TOKENS = np.array([3, 6], np.int32)
SHAPES = jax.eval_shape(Small().init, jax.random.key(0), IMAGES, TOKENS)


def state_dict():
    """As PyTorch would hold it."""
    shapes = {
        "conv.weight": (4, 2, 3, 5),
        "conv.bias": (4,),
        "grouped.weight": (8, 1, 3, 3),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "norm.running_mean": (8,),
        "norm.running_var": (8,),
        "fc.weight": (3, 8),
        "fc.bias": (3,),
        "embed.weight": (7, 8),
    }
    rng = np.random.default_rng(0)
    state = {n: rng.uniform(0.5, 1, shape).astype(np.float32) for n, shape in shapes.items()}
    return {**state, "norm.num_batches_tracked": np.int64(5)}


def correlation(images, kernel, groups):
    """What PyTorch's Conv2d computes with odd kernels and "same" padding, NCHW and OIHW."""
    outputs, inputs, height, width = kernel.shape
    pads = ((0, 0), (0, 0), (height // 2,) * 2, (width // 2,) * 2)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, pads), (height, width), axis=(2, 3)
    )
    per_group = outputs // groups
    return np.stack(
        [
            np.einsum("bihwyx,iyx->bhw", windows[:, inputs * (o // per_group) :][:, :inputs], k)
            for o, k in enumerate(kernel)
        ],
        axis=1,
    )


def test_every_kind_of_layer_computes_what_pytorch_does():
    state = state_dict()
    logits = Small().apply(import_params(state, SHAPES), IMAGES, TOKENS)
    x = correlation(IMAGES.transpose(0, 3, 1, 2), state["conv.weight"], 1)
    x = correlation(x + state["conv.bias"][:, None, None], state["grouped.weight"], 4)
    x = x.mean((2, 3)) - state["norm.running_mean"]
    x = x / np.sqrt(state["norm.running_var"] + 1e-5) * state["norm.weight"] + state["norm.bias"]
    expected = (x + state["embed.weight"][TOKENS]) @ state["fc.weight"].T + state["fc.bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_results_are_float32(dtype):
    state = {name: value.astype(dtype) for name, value in state_dict().items()}
    variables = import_params(state, SHAPES)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    bias = np.asarray(state["fc.bias"]).astype(np.float32)
    np.testing.assert_array_equal(variables["params"]["fc"]["bias"], bias)


def test_names_are_rewritten():
    state = {f"model.{name}".replace("fc", "head"): value for name, value in state_dict().items()}
    rename = ((r"^model\.", ""), (r"^head\.", "fc."))
    jax.tree.map(
        np.testing.assert_array_equal,
        import_params(state, SHAPES, rename=rename),
        import_params(state_dict(), SHAPES),
    )


def test_left_over_missing_and_misshapen_are_listed_together():
    state = state_dict()
    state["fc.weights"] = state.pop("fc.weight")
    state["extra.table"] = np.zeros((2, 9), np.float32)
    state["conv.bias"] = np.zeros(5, np.float32)
    with pytest.raises(WeightError) as caught:
        import_params(state, SHAPES)
    message = str(caught.value)
    assert "no place for tensors of the checkpoint (2):" in message
    assert "fc.weights [3, 8] (near: fc.weight [3, 8])" in message
    assert "extra.table [2, 9]\n" in message
    assert (
        "missing from the checkpoint (1):\n    fc.weight [3, 8] (near: fc.weights [3, 8])"
        in message
    )
    assert "of another shape (1):\n    conv.bias [5], expected [4]" in message


def test_a_kernel_already_in_flax_layout_is_refused():
    state = state_dict()
    state["fc.weight"] = state["fc.weight"].T
    with pytest.raises(WeightError, match=r"fc.weight \[8, 3\], expected \[3, 8\]"):
        import_params(state, SHAPES)


def test_ignored_tensors_are_declared():
    state = {**state_dict(), "fc.position_ids": np.arange(3)}
    with pytest.raises(WeightError, match=r"fc\.position_ids"):
        import_params(state, SHAPES)
    import_params(state, SHAPES, ignore=(r".*num_batches_tracked", r".*position_ids"))
    with pytest.raises(WeightError, match=r"norm\.num_batches_tracked"):
        import_params(state_dict(), SHAPES, ignore=())


def test_two_tensors_for_one_place():
    state = {**state_dict(), "old.weight": state_dict()["fc.weight"]}
    with pytest.raises(WeightError, match=r"old.weight, as fc.weight"):
        import_params(state, SHAPES, rename=((r"^old\.", "fc."),))


def test_two_places_for_one_tensor():
    norm = {"scale": np.zeros(3), "kernel": np.zeros((3, 3))}
    with pytest.raises(WeightError, match=r"norm/scale and params/norm/kernel .* norm.weight"):
        import_params({}, {"params": {"norm": norm}})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full(3, np.nan, np.float32), r"with NaN or infinity \(1\):\n    fc.bias"),
        (np.zeros(3, np.int8), r"not floating point \(1\):\n    fc.bias int8"),
    ],
)
def test_values_that_are_no_weights(value, message):
    with pytest.raises(WeightError, match=message):
        import_params({**state_dict(), "fc.bias": value}, SHAPES)


def test_long_lists_are_cut():
    state = {**state_dict(), **{f"other.{i}": np.zeros(1, np.float32) for i in range(30)}}
    with pytest.raises(WeightError, match=r"checkpoint \(30\):(?s:.*)and 10 more"):
        import_params(state, SHAPES)


def test_safetensors_of_every_float_type(tmp_path):
    save_file({"a": np.ones((2, 3), np.float16), "n": np.array(2**40)}, tmp_path / "a.safetensors")
    loaded = load_state_dict(tmp_path / "a.safetensors")
    assert loaded["a"].dtype == np.float16 and loaded["n"] == 2**40
    save_jax({"a": jnp.full(3, 1.5, jnp.bfloat16)}, tmp_path / "b.safetensors")
    assert load_state_dict(tmp_path / "b.safetensors")["a"].astype(np.float32).tolist() == [1.5] * 3


def test_wrappers_and_prefixes_are_taken_off():
    inner = OrderedDict({"module.a.weight": np.ones(2), "module.module.bias": np.ones(1)})
    plain = plain_state_dict({"epoch": 7, "model": {"state_dict": inner}})
    assert list(plain) == ["a.weight", "module.bias"]
    # A network may have a part of that name.
    assert list(plain_state_dict({"module.a": np.ones(2), "b": np.ones(2)})) == ["module.a", "b"]


def test_not_a_state_dict():
    with pytest.raises(WeightError, match="'optimizer' is a str, not a tensor"):
        plain_state_dict({"a": np.ones(2), "optimizer": "sgd"})
    with pytest.raises(WeightError, match="the checkpoint is a list"):
        plain_state_dict([np.ones(2)])


class TorchTensor:
    """A stand-in that converts only as PyTorch's tensors do."""

    def __init__(self, value, floating=True):
        self.value, self.dtype = value, types.SimpleNamespace(is_floating_point=floating)
        self.shape, self.ready = value.shape, False

    def detach(self):
        return TorchTensor(self.value, self.dtype.is_floating_point)

    def cpu(self):
        self.ready = True
        return self

    def float(self):
        self.value = self.value.astype(np.float32)
        return self

    def __array__(self, dtype=None, copy=None):
        assert self.ready and self.value.dtype != jnp.bfloat16
        return self.value


def test_torch_files_are_read_without_running_code(tmp_path, monkeypatch):
    calls = []

    def load(path, device, *, weights_only):
        calls.append((path, device, weights_only))
        tensors = {
            "module.a.weight": TorchTensor(np.ones(2, jnp.bfloat16)),
            "module.a.num_batches_tracked": TorchTensor(np.array(2**40), floating=False),
        }
        return {"state_dict": tensors, "best_prec1": 91.7}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    path = tmp_path / "weights.th"
    path.touch()
    loaded = load_state_dict(path)
    assert calls == [(path, "cpu", True)]
    assert loaded["a.weight"].dtype == np.float32
    assert loaded["a.num_batches_tracked"] == 2**40


def test_missing_torch_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ImportError, match=r"jaxrmils\[torch\].*safetensors"):
        load_state_dict(tmp_path / "weights.pt")


def test_unknown_and_absent_files(tmp_path):
    (tmp_path / "weights.h5").touch()
    with pytest.raises(WeightError, match=r"weights.h5 is neither .safetensors nor a torch file"):
        load_state_dict(tmp_path / "weights.h5")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_state_dict(tmp_path / "weights.safetensors")
