"""The configuration that every config file starts from."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def base_config() -> Any:
    """A config with every field that the commands read; its types are checked on override.

    >>> base_config().policy.name
    'lossless'
    """
    config: Any = ConfigDict()  # its fields are not known to type checkers
    config.seed = 0
    # A task: "mnist_cnn", "images", "squad", "texts", "package.module:function" or
    # "file.py:function". The function gets this config and a progress drawer and returns a
    # `jaxrmils.data.Task`.
    config.task = "mnist_cnn"

    # What the tasks "images", "squad" and "texts" quantize; "mnist_cnn" trains its own.
    config.model = ConfigDict()
    config.model.name = ""  # a reference network (`jaxrmils.zoo`)
    config.model.weights = ""  # its checkpoint: .safetensors, or .pt/.pth with the extra "torch"
    config.model.tokenizer = ""  # tokenizer.json or vocab.txt
    config.model.max_length = 384  # tokens

    # And the data they read: a data set that TFDS has prepared, or files.
    config.data = ConfigDict()
    config.data.name = ""  # TFDS's name, such as "imagenet2012"
    config.data.split = "validation"
    config.data.data_dir = ""
    config.data.text_feature = "text"  # texts: the names that TFDS's data set has for them
    config.data.label_feature = "label"
    config.data.files = ""  # images: folder or zip; squad: JSON; texts, mnist_cnn: CSV
    config.data.labels = ""  # images: CSV with the columns file and label, else folders are classes
    config.data.where = ()  # rows of that table, as in split=heldout; () for all
    config.data.examples = 0  # use only so many, drawn by the seed; 0 for all
    config.data.trained_on = False  # the model has seen them: good for ranges, never for a verdict
    # Further files of the same form, for the splits named below only.
    config.data.calibration = ""
    config.data.calibration_labels = ""
    config.data.calibration_where = ()
    config.data.calibration_splits = ("ranges",)  # or ("ranges", "selection")
    config.data.calibration_trained_on = False
    config.batch_size = 125  # 0 for as many examples as fit, at most 250
    config.memory_bytes = 2_000_000_000  # what that may take, beside the parameters
    # Count exactly what the programs need, parameters included: compiles them a few times more.
    config.batch_size_exact = False
    # What is kept low: "task", or without labels the distance to the float model's own outputs,
    # "kl" (of their softmax) or "squared".
    config.loss = "task"
    # What is kept of the selection split: "examples", or "moments" of any number of them in memory
    # that does not grow, for budgets (docs/scale.md).
    config.scores = "examples"
    config.curvature = False  # also estimate every layer's second-order term (8 more passes)
    # What shortcuts around a layer read: "float", or "codes", the layer's own quantized input.
    config.shortcuts = "float"
    config.backend = ""  # "cpu", "cuda", "tpu"; empty for where jax runs

    config.train = ConfigDict()
    config.train.examples = 2_000
    config.train.copies = 4
    config.train.epochs = 4
    config.train.batch_size = 64
    config.train.learning_rate = 3e-3

    # Sizes of the four disjoint splits; the model's training examples are in none of them.
    config.splits = ConfigDict()
    config.splits.ranges = 250
    config.splits.selection = 750
    config.splits.confirmation = 500
    config.splits.test = 1_500

    config.ranges = ConfigDict()
    config.ranges.estimator = "mse"  # minmax, percentile, mse, aciq_gauss, aciq_laplace
    config.ranges.symmetric = False
    config.ranges.percentile = 99.99

    config.policy = ConfigDict()
    config.policy.name = "lossless"  # or budget, rmils, uniform, file
    config.policy.mu = 0.001  # rmils: the threshold
    config.policy.variant = "radical"  # rmils: or balanced
    config.policy.normalization = "raw"  # rmils: raw, t, cosine
    config.policy.probe = "tangent"  # rmils: or shift
    config.policy.bits = (8,)  # rmils: widths to choose from
    config.policy.weights = "same"  # rmils: same, int8, int4, float
    config.policy.lookups = "float"  # rmils: int8, int4, float
    config.policy.formats = ("w8a8", "w4a8", "w4a4")  # lossless, budget: formats to choose from
    config.policy.rounds = 4  # lossless: how often secant shares are taken at the boundary
    config.policy.length = 16  # lossless: plans to test, at most
    config.policy.caution = 1.0  # lossless: standard errors added to what a format costs
    config.policy.compute = 0.1  # lossless: what a share of the work counts against one of the size
    config.policy.directed = True  # lossless: allow rounding directions that pay
    # budget: what a plan may use at most, any mix of them; 0 does not limit.
    config.policy.limits = ConfigDict()
    config.policy.limits.size_bytes = 0.0  # of the stored model
    config.policy.limits.size_share = 0.0  # the same as a share of the float model
    config.policy.limits.weight_bits = 0.0  # average of a weight element
    config.policy.limits.activation_bits = 0.0  # average of an activation element
    config.policy.limits.bops = 0.0  # bit operations for one example
    config.policy.limits.bops_share = 0.0  # the same as a share of 32 x 32 bits
    config.policy.limits.latency = 0.0  # seconds; needs latency_table
    config.policy.latency_table = ""  # budget: of `jaxrmils profile` or `aot --latency`
    # budget: squared, signed, upper_bound, joint_upper_bound, from the scores; or from a pass of
    # its own squared_output, fisher, hessian_trace, sqnr, measured (docs/objectives.md).
    config.policy.objective = "squared"
    config.policy.refine = 0  # budget: rounds of refinement by the secant; True for 4
    config.policy.rounding = "nearest"  # budget: or directed
    config.policy.groups = ()  # budget: globs whose layers share a format, ("a/*", "b/*"), "qkv"
    config.policy.capabilities = ""  # budget: formats that gain something on cpu, cuda or tpu
    config.policy.format = "int8"  # uniform: int8, int4, float, w8a8d, w4g128, ...
    config.policy.file = ""  # file: a plan that a run, `jaxrmils pareto` or save_plan wrote
    config.policy.skip = ()  # globs of layers that stay float
    config.policy.force = ()  # "glob=format", first match counts

    config.verify = ConfigDict()
    config.verify.margin = 0.0  # largest loss change that is lossless; 0 for 0.5 %, >= 0.005
    config.verify.alpha = 0.05
    config.verify.layers = True  # also measure every layer alone
    config.verify.attribute = True  # share out the joint change among the layers
    config.verify.points = 2  # quadrature points of that
    config.verify.controls = True  # other roundings, constant shift, temperature, uniform plans
    config.verify.compare = ("int8", "int4")  # uniform plans among the controls
    return config
