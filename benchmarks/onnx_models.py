"""The zoo's networks as ONNX graphs, quantized and run by onnxruntime.

The graphs are what an exporter would write at its best: NCHW, BatchNorm folded into convolutions,
LayerNormalization and Gelu as single operators, any batch size.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from speed_models import BERT_INPUTS, Workload

from jaxrmils.zoo import BertConfig, BertEncoder, MobileNetV2, ResNet
from jaxrmils.zoo.efficientnet_lite import STAGES as LITE_STAGES
from jaxrmils.zoo.efficientnet_lite import EfficientNetLite
from jaxrmils.zoo.mobilenet_v2 import STAGES as MOBILE_STAGES

OPSET = 20


class GraphWriter:
    """Collects the nodes and constants of an ONNX graph; values are known by their names."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, values: Any) -> str:
        """A new constant's name."""
        from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

        name = f"constant_{len(self.constants)}"
        array = np.ascontiguousarray(values)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Appends a node with one output and gives the output's name."""
        from onnx import helper  # pyright: ignore[reportMissingImports]

        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def conv_norm(
        self,
        value: str,
        kernel: Any,
        norm: tuple[Any, Any, float],
        *,
        stride: int = 1,
        groups: int = 1,
        same: bool = False,
    ) -> str:
        """A convolution with its BatchNorm; padded as TensorFlow's "SAME" or by half the kernel."""
        kernel, bias = fold(np.asarray(kernel), *norm)
        size = kernel.shape[0]
        padding = {"auto_pad": "SAME_UPPER"} if same else {"pads": [(size - 1) // 2] * 4}
        weights = self.constant(kernel.transpose(3, 2, 0, 1)), self.constant(bias)
        strides, shape = [stride, stride], [size, size]
        return self.add(
            "Conv", value, *weights, strides=strides, group=groups, kernel_shape=shape, **padding
        )

    def relu6(self, value: str) -> str:
        """Values clipped to [0, 6]."""
        return self.add("Clip", value, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def classifier(self, value: str, params: Any) -> str:
        """Mean over pixels and a dense layer."""
        pooled = self.add("Flatten", self.add("GlobalAveragePool", value))
        weights = self.constant(params["kernel"]), self.constant(params["bias"])
        return self.add("Gemm", pooled, *weights)

    def dense(self, value: str, params: Any) -> str:
        """A dense layer along the last axis."""
        product = self.add("MatMul", value, self.constant(params["kernel"]))
        return self.add("Add", product, self.constant(params["bias"]))

    def layer_norm(self, value: str, params: Any, epsilon: float) -> str:
        """Normalization along the last axis."""
        weights = self.constant(params["scale"]), self.constant(params["bias"])
        return self.add("LayerNormalization", value, *weights, axis=-1, epsilon=epsilon)

    def model(self, inputs: list[Any], output: str, rank: int) -> Any:
        """The graph as an ONNX model with one float32 output of a rank."""
        from onnx import TensorProto, checker, helper  # pyright: ignore[reportMissingImports]

        shape = ["batch", *(None for _ in range(rank - 1))]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "network", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        checker.check_model(model)
        return model


def fold(kernel: Any, scales: Any, stats: Any, epsilon: float) -> tuple[Any, Any]:
    """A convolution and the BatchNorm behind it as one convolution with a bias.

    Args:
        kernel: float32 `[height, width, inputs, outputs]`.
        scales: `{"scale", "bias"}`, `[outputs]` each.
        stats: `{"mean", "var"}`, `[outputs]` each.
        epsilon: added to the variance.

    Returns:
        Kernel and bias, float32.
    """
    scales, stats = ({k: np.asarray(v) for k, v in each.items()} for each in (scales, stats))
    factor = scales["scale"] / np.sqrt(stats["var"] + np.float32(epsilon))
    return kernel * factor, scales["bias"] - stats["mean"] * factor


def _resnet(graph: GraphWriter, value: str, module: ResNet, params: Any, stats: Any) -> str:
    def norm(params: Any, stats: Any, name: str) -> Any:
        return params[name], stats[name], 1e-5

    first = graph.conv_norm(value, params["conv1"]["kernel"], norm(params, stats, "bn1"), stride=2)
    value = graph.add("Relu", first)
    value = graph.add("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for stage, depth in enumerate(module.depths):
        for block in range(depth):
            path = f"layer{stage + 1}", str(block)
            p, s = params[path[0]][path[1]], stats[path[0]][path[1]]
            stride = 2 if stage and not block else 1
            kernel = p["conv1"]["kernel"]
            hidden = graph.conv_norm(value, kernel, norm(p, s, "bn1"), stride=stride)
            hidden = graph.add("Relu", hidden)
            hidden = graph.conv_norm(hidden, p["conv2"]["kernel"], norm(p, s, "bn2"))
            if "downsample" in p:
                short, moments = p["downsample"], s["downsample"]
                kernel = short["0"]["kernel"]
                value = graph.conv_norm(value, kernel, norm(short, moments, "1"), stride=stride)
            value = graph.add("Relu", graph.add("Add", hidden, value))
    return graph.classifier(value, params["fc"])


def _mobilenet(graph: GraphWriter, value: str, params: Any, stats: Any) -> str:
    def conv_norm(value: str, p: Any, s: Any, stride: int = 1, groups: int = 1) -> str:
        norm = p["1"], s["1"], 1e-5
        hidden = graph.conv_norm(value, p["0"]["kernel"], norm, stride=stride, groups=groups)
        return graph.relu6(hidden)

    params, stats, fc = params["features"], stats["features"], params["classifier"]["1"]
    value = conv_norm(value, params["0"], stats["0"], stride=2)
    number = 1
    for expansion, _, repeats, first in MOBILE_STAGES:
        for repeat in range(repeats):
            p, s = params[str(number)]["conv"], stats[str(number)]["conv"]
            hidden, at, stride = value, 0, first if repeat == 0 else 1
            if expansion != 1:
                hidden, at = conv_norm(hidden, p["0"], s["0"]), 1
            depthwise = p[str(at)]
            groups = depthwise["0"]["kernel"].shape[-1]
            hidden = conv_norm(hidden, depthwise, s[str(at)], stride, groups)
            norm = p[str(at + 2)], s[str(at + 2)], 1e-5
            hidden = graph.conv_norm(hidden, p[str(at + 1)]["kernel"], norm)
            value = graph.add("Add", value, hidden) if repeat else hidden
            number += 1
    value = conv_norm(value, params[str(number)], stats[str(number)])
    return graph.classifier(value, fc)


def _lite_blocks() -> Iterator[tuple[int, int, bool]]:
    """Stride, expansion, and whether there is a shortcut, of EfficientNet-Lite0's blocks."""
    for _, first, expansion, _, repeats in LITE_STAGES:
        for repeat in range(repeats):
            yield (1 if repeat else first), expansion, repeat > 0


def _efficientnet(graph: GraphWriter, value: str, params: Any, stats: Any) -> str:
    def conv(
        value: str, p: Any, s: Any, names: tuple[str, str], stride: int = 1, groups: int = 1
    ) -> str:
        norm = p[names[1]], s[names[1]], 1e-3
        kernel = p[names[0]]["kernel"]
        return graph.conv_norm(value, kernel, norm, stride=stride, groups=groups, same=True)

    value = graph.relu6(conv(value, params, stats, ("_conv_stem", "_bn0"), 2))
    for number, (stride, expansion, shortcut) in enumerate(_lite_blocks()):
        p, s = params["_blocks"][str(number)], stats["_blocks"][str(number)]
        hidden = value
        if expansion != 1:
            hidden = graph.relu6(conv(hidden, p, s, ("_expand_conv", "_bn0")))
        groups = p["_depthwise_conv"]["kernel"].shape[-1]
        hidden = graph.relu6(conv(hidden, p, s, ("_depthwise_conv", "_bn1"), stride, groups))
        hidden = conv(hidden, p, s, ("_project_conv", "_bn2"))
        value = graph.add("Add", value, hidden) if shortcut else hidden
    value = graph.relu6(conv(value, params, stats, ("_conv_head", "_bn1")))
    return graph.classifier(value, params["_fc"])


def _bert(graph: GraphWriter, config: BertConfig, params: Any, length: int) -> str:
    table = params["embeddings"]
    epsilon = config.layer_norm_epsilon
    words, types = (
        graph.add("Gather", graph.constant(table[f"{name}_embeddings"]["embedding"]), ids)
        for name, ids in (("word", "input_ids"), ("token_type", "token_type_ids"))
    )
    positions = graph.constant(table["position_embeddings"]["embedding"][:length])
    hidden = graph.add("Add", graph.add("Add", words, types), positions)
    hidden = graph.layer_norm(hidden, table["LayerNorm"], epsilon)
    mask = graph.add("Cast", graph.add("Unsqueeze", "attention_mask", _axes(graph, 1, 2)), to=1)
    absent = graph.add("Sub", graph.constant(np.float32(1)), mask)
    bias = graph.add("Mul", absent, graph.constant(np.finfo(np.float32).min))
    for number in range(config.layers):
        layer = params[f"layer_{number}"]
        attended = _attention(graph, hidden, layer["attention"], bias, config)
        attended = graph.dense(attended, layer["attention_output"])
        hidden = graph.add("Add", hidden, attended)
        hidden = graph.layer_norm(hidden, layer["attention_LayerNorm"], epsilon)
        inner = graph.add("Gelu", graph.dense(hidden, layer["intermediate"]))
        hidden = graph.add("Add", hidden, graph.dense(inner, layer["output"]))
        hidden = graph.layer_norm(hidden, layer["output_LayerNorm"], epsilon)
    return hidden


def _axes(graph: GraphWriter, *axes: int) -> str:
    return graph.constant(np.array(axes, np.int64))


def _attention(graph: GraphWriter, hidden: str, params: Any, bias: str, config: BertConfig) -> str:
    depth = config.hidden_size // config.heads

    def heads(name: str, order: list[int]) -> str:
        shape = _axes(graph, 0, 0, config.heads, depth)
        split = graph.add("Reshape", graph.dense(hidden, params[name]), shape)
        return graph.add("Transpose", split, perm=order)

    query, value = (heads(name, [0, 2, 1, 3]) for name in ("query", "value"))
    scores = graph.add("MatMul", query, heads("key", [0, 2, 3, 1]))
    scores = graph.add("Div", scores, graph.constant(np.float32(depth**0.5)))
    weights = graph.add("Softmax", graph.add("Add", scores, bias), axis=-1)
    mixed = graph.add("Transpose", graph.add("MatMul", weights, value), perm=[0, 2, 1, 3])
    return graph.add("Reshape", mixed, _axes(graph, 0, 0, config.hidden_size))


def float_model(work: Workload) -> Any:
    """The network as a float32 ONNX model.

    Raises:
        ImportError: onnx is not installed.
        ValueError: the network has no graph here.
    """
    from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]

    graph = GraphWriter()
    params, stats = work.variables["params"], work.variables.get("batch_stats")
    example = work.make_inputs(1)
    if isinstance(work.module, BertEncoder):
        length = example["input_ids"].shape[1]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT32, ["batch", length])
            for name in BERT_INPUTS
        ]
        return graph.model(inputs, _bert(graph, work.module.config, params, length), 3)
    size = example.shape[1]
    shape = ["batch", 3, size, size]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)]
    if isinstance(work.module, ResNet):
        output = _resnet(graph, "images", work.module, params, stats)
    elif isinstance(work.module, MobileNetV2):
        output = _mobilenet(graph, "images", params, stats)
    elif isinstance(work.module, EfficientNetLite):
        output = _efficientnet(graph, "images", params, stats)
    else:
        raise ValueError(f"no ONNX graph for {type(work.module).__name__}")
    return graph.model(inputs, output, 2)


def feeds(inputs: Any) -> dict[str, Any]:
    """Inputs of the Flax module as those of its ONNX model."""
    if isinstance(inputs, dict):
        return inputs
    return {"images": np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))}


def int8_model(model: Any, example: Any, *, dynamic: bool) -> bytes:
    """A float model in onnxruntime's int8, with int8 weights and uint8 activations.

    Args:
        model: from `float_model`.
        example: inputs of the Flax module, on which ranges are measured.
        dynamic: ranges of activations are measured in every call, and only products with weights
            are integer; otherwise QDQ with fixed ranges and a scale for every output channel.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    from onnxruntime import quantization as ort  # pyright: ignore[reportMissingImports]

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [feeds(example)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        if dynamic:
            ort.quantize_dynamic(model, path, weight_type=ort.QuantType.QInt8)
        else:
            ort.quantize_static(
                model, path, Reader(),
                quant_format=ort.QuantFormat.QDQ, per_channel=True,
                activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
            )  # fmt: skip
        return path.read_bytes()


def session(model: bytes) -> Callable[[Any], Any]:
    """A function from `feeds` to the output, on as many threads as there are cores.

    Threads stop spinning when a call ends, so that they take no time from what runs next.
    """
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    running = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda inputs: running.run(None, inputs)[0]
