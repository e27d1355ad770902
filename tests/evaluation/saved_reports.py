"""Saved reports as JSON values: a full one, one of many layers, and one of an older version."""

import math

import numpy as np

from jaxrmils.statistics import noninferiority, verdict_words

MARGIN = 0.005


def interval(mean, half, n=750, **more):
    return {
        "mean": mean,
        "standard_error": half / 1.96,
        "lower": mean - half,
        "upper": mean + 1.1 * half,
        "n": n,
        "level": 0.95,
        "method": "skewness-adjusted",
        **more,
    }


def noninferior(mean, half, n=1500, **more):
    upper, lower = mean + 0.9 * half, mean - 0.84 * half
    return {
        "mean": mean,
        "standard_error": half / 1.96,
        "lower_bound": lower,
        "upper_bound": upper,
        "margin": MARGIN,
        "alpha": 0.05,
        "n": n,
        "method": "skewness-adjusted",
        "passed": upper < MARGIN,
        "needed_n": 640,
        **more,
    }


def old_layer(name, format_, rounding, bits, mean=None):
    width = {"float": 32, "w8a8": 8, "w4a8": 4, "w4a4": 4, "w8": 8, "w4": 4, "a8": 32}[format_]
    quantized = mean is not None
    return {
        "name": name,
        "format": format_,
        "rounding": rounding,
        "float_bits": bits,
        "quantized_bits": bits * width // 32 + (320 if width < 32 and bits else 0),
        "predicted": interval(mean, 0.0012) if quantized else None,
        "measured": interval(0.8 * mean - 0.0001, 0.0010, 1500) if quantized else None,
    }


def minimal():
    """What the first version wrote, without labels and with no optional part."""
    layers = [
        old_layer("Conv_0/kernel", "float", [], 4608),
        old_layer("Dense_0/kernel", "w8a8", ["floor"], 3211264, -0.0004),
    ]
    test = noninferior(-0.0011, 0.001)
    return {
        "layers": layers,
        "coverage": {
            "entries": [
                {
                    "op": "dot_general",
                    "scope": "Dense_0",
                    "status": "site",
                    "reason": "Dense_0/kernel",
                }
            ]
        },
        "float_bits": 3300000,
        "quantized_bits": 850000,
        "float_loss": 0.075,
        "predicted": None,
        "measured": interval(-0.0011, 0.001, 1500),
        "test": test,
        "verdict": "lossless within 0.005 nats at 95 % (upper bound -0.0002, n = 1500)",
        "float_accuracy": None,
        "accuracy": None,
        "differing_codes": 0.0,
        "code_steps": 0,
        "planned_sites": 1,
        "integer_sites": 1,
        "notes": [],
        "mu": {},
        "comparisons": [
            {
                "name": "uniform int4",
                "size_bits": 430944,
                "mean": 0.00689,
                "upper_bound": 0.0129,
                "passed": False,
                "verdict": "no evidence either way",
            }
        ],
    }


def full():
    """Every optional part, a hostile layer name among the layers."""
    layers = [
        old_layer("Conv_0/kernel", "float", [], 46080),
        old_layer("Conv_1/kernel", "w8a8", ["ceil"], 1474560, -0.0004),
        old_layer("Encoder/<Block & 'co'>/kernel", "w4a8", ["nearest"], 2411264, 0.0011),
        old_layer("attention/dot", "a8", ["floor", "ceil"], 0, -0.0001),
        old_layer("Dense_0/kernel", "w4a4", ["floor"], 3211264, 0.0018),
        old_layer("Dense_1/kernel", "w8", [], 20480, -0.0001),
    ]
    for layer in layers:
        if layer["measured"]:
            mean = layer["measured"]["mean"]
            layer["attributed"] = interval(1.1 * mean, 0.0007, 1500)
            layer["curvature"] = interval(0.0002, 0.0001)
    test = noninferior(0.0021, 0.0016, groups=300)
    test["bounds"] = {
        "t": [0.0009, 0.0035],
        "bootstrap": [0.0008, 0.0036],
        "skewness-adjusted": [test["lower_bound"], test["upper_bound"]],
    }
    return minimal() | {
        "layers": layers,
        "float_bits": sum(layer["float_bits"] for layer in layers) + 30000,
        "quantized_bits": sum(layer["quantized_bits"] for layer in layers) + 30000,
        "predicted": interval(0.0023, 0.0018),
        "predicted_secant": interval(0.0022, 0.0019),
        "attributed": interval(0.0020, 0.0016, 1500),
        "residual": interval(0.0001, 0.0001, 1500),
        "measured": interval(0.0021, 0.0016, 1500),
        "test": test,
        "float_accuracy": 0.976,
        "accuracy": {
            "gained": 3,
            "lost": 5,
            "n": 1500,
            "difference": -2 / 1500,
            "p_value": 0.73,
            "drop_upper": 0.0047,
            "alpha": 0.05,
            "groups": 300,
        },
        "notes": ["int4 weights are smaller but not faster on CPU: <every> call unpacks them"],
        "coverage": {
            "entries": [
                {"op": "dot_general", "scope": "Dense_0", "status": "site", "reason": "Dense_0"},
                {"op": "dot_general", "scope": "", "status": "float", "reason": "int32 operands"},
            ]
        },
        "controls": controls(test),
        "curve": [
            {
                "examples": n,
                "predicted": interval(0.0023 + 0.004 / math.sqrt(n), 0.05 / math.sqrt(n), n),
                "sign_agreement": 1 - 2.0 / math.sqrt(n),
            }
            for n in (25, 50, 100, 200, 400, 750)
        ],
        "lossless": lossless(test),
        "mu": {layer["name"]: {"8": 0.012, "4": 0.034} for layer in layers[:3]},
        "comparisons": None,
    }


def with_metrics():
    """A full report with metrics, of which Acc@1 says the same as the accuracy."""
    report = full()
    shared = {"alpha": 0.05, "change": interval(-2 / 1500, 0.004, 1500, groups=300)}
    first = {"name": "Acc@1", "float_mean": 0.976, "quantized_mean": 0.976 - 2 / 1500}
    second = {"name": "<F1>", "float_mean": 0.98, "quantized_mean": 0.979, "drop_upper": 0.0031}
    first |= shared | {"drop_upper": 0.0047, "accuracy": report["accuracy"]}
    return report | {"metrics": [first, shared | second | {"accuracy": None}]}


def controls(test):
    def control(name, kind, bits, mean, half, note=""):
        found = test if kind == "this plan" else noninferior(mean, half)
        verdict = "not lossless" if not found["passed"] else "lossless within 0.005 nats at 95 %"
        return {
            "name": name,
            "kind": kind,
            "size_bits": bits,
            "test": found,
            "verdict": verdict,
            "accuracy_difference": -mean / 3,
            "note": note,
        }

    return [
        control("this plan", "this plan", 1_800_000, 0.0021, 0.0016),
        control("nearest everywhere", "rounding", 1_800_000, 0.0034, 0.0017),
        control("ceil everywhere", "rounding", 1_800_000, 0.31, 0.02, "a systematic shift"),
        control("directions at random", "rounding", 1_800_000, 0.0061, 0.004, "mean of 50 draws"),
        control("float + same constant shift", "float", 7_200_000, -0.0007, 0.0006),
        control("float + temperature", "float", 7_200_000, -0.0019, 0.0012, "T = 1.043"),
        control("uniform int8", "uniform", 1_830_000, 0.0002, 0.0003),
        control("uniform int4", "uniform", 930_000, 0.0197, 0.006),
    ]


def lossless(test):
    plans = (
        (2_400_000, {"w8a8": 5}, 0.0001, noninferior(0.0002, 0.0004)),
        (2_200_000, {"w8a8": 4, "w4a8": 1}, 0.0006, noninferior(0.0009, 0.0009)),
        (1_800_000, {"w8a8": 3, "w4a8": 1, "w4a4": 1}, 0.0017, test),
        (1_500_000, {"w8a8": 2, "w4a8": 2, "w4a4": 1}, 0.0036, noninferior(0.0047, 0.002)),
        (1_200_000, {"w4a8": 3, "w4a4": 2}, 0.0065, None),
        (930_000, {"w4a4": 5}, 0.0180, None),
    )
    return {
        "margin": MARGIN,
        "alpha": 0.05,
        "words": "the smallest plan that passed, tested in the order set beforehand",
        "steps": [
            {
                "size_bits": bits,
                "formats": formats,
                "selection": interval(mean, 0.0015),
                "test": found,
                "chosen": bits == 1_800_000,
            }
            for bits, formats, mean, found in plans
        ],
    }


def large(count=200):
    """A transformer's worth of layers, with heavy tails."""
    rng = np.random.default_rng(0)
    report = full()
    formats = ("w8a8", "w4a8", "w4a4", "w8", "w4", "float")
    layers = []
    for i in range(count):
        format_ = formats[int(rng.choice(6, p=(0.4, 0.25, 0.15, 0.08, 0.07, 0.05)))]
        mean = None if format_ == "float" else float(rng.standard_t(2) * 2e-4)
        bits = int(rng.choice((768 * 768, 768 * 3072, 3072 * 768))) * 32
        name = (
            f"encoder/layer_{i // 6}/{('query', 'key', 'value', 'out', 'wi', 'wo')[i % 6]}/kernel"
        )
        layer = old_layer(name, format_, [] if "a" not in format_ else ["floor"], bits, mean)
        if mean is not None:
            layer["attributed"] = interval(float(mean + rng.normal() * 5e-5), 2e-4, 1500)
            layer["measured"] = interval(float(mean + rng.normal() * 1e-4), 3e-4, 1500)
            layer["predicted"] = interval(mean, 4e-4)
        layers.append(layer)
    sizes = [sum(layer[f"{kind}_bits"] for layer in layers) for kind in ("float", "quantized")]
    scale = sizes[1] / 1_800_000
    for control in report["controls"]:
        control["size_bits"] = int(control["size_bits"] * scale)
    return report | {"layers": layers, "float_bits": sizes[0], "quantized_bits": sizes[1]}


def undecided():
    changes = np.random.default_rng(0).standard_t(3, size=200) * 0.2
    test = noninferiority(changes, margin=MARGIN)
    numbers = {name: getattr(test, name) for name in noninferior(0.0, 1.0)}
    return minimal() | {"test": numbers, "verdict": verdict_words(test)}


RUN = {
    "config": {"task": "mnist_cnn", "policy": {"name": "rmils", "mu": 0.001, "bits": [8, 4]}},
    "config_file": "/home/someone/configs/cnn.py",
    "splits": "f51941707ad2bd2cc48465a80351c607a96b77d3b2224a63971a77477dc255b3",
    "versions": {"python": "3.12.1", "jax": "0.12.0"},
}
