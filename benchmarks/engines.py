"""CPU inference engines that re-rank with an exported cross-encoder: ONNX Runtime and OpenVINO, float32 and int8.

Pairs are length-sorted and padded to the longest of the batch, as these engines want them; each is given the settings
that its own documentation recommends for transformers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from baselines import _Padded
from transformers import AutoModelForSequenceClassification

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def exported(folder: Path) -> Path:
    """The checkpoint as an ONNX file whose batch and length are free, in its folder; made once."""
    target = Path(folder) / "model.onnx"
    if target.exists():
        return target
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    example = {name: torch.ones(2, 7, dtype=torch.int64) for name in INPUTS}
    axes = {name: {0: "batch", 1: "length"} for name in INPUTS}
    torch.onnx.export(
        model,
        (),
        target,
        kwargs=example,
        input_names=list(INPUTS),
        output_names=["logits"],
        dynamic_axes=axes | {"logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    return target


class _Engine(_Padded):
    """Strings in, scores out; `run` takes the padded arrays of one batch."""

    def scores(self, lists, batch_size: int) -> np.ndarray:
        scores = np.empty(sum(len(one.documents) for one in lists), np.float32)
        for rows, batch in self.batches(lists, batch_size):
            scores[rows] = self.run({name: batch[name].numpy() for name in INPUTS})
        return scores


class OnnxRuntime(_Engine):
    """int8 is dynamic quantisation with one scale a column; 7-bit weights where the processor lacks VNNI, as ONNX
    Runtime advises (reduce_range)."""

    def __init__(self, folder, dtype: str, max_length: int):
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        super().__init__(folder, max_length)
        path = exported(folder)
        if dtype == "int8":
            quantised = path.with_name("int8.onnx")
            has_vnni = "avx512_vnni" in Path("/proc/cpuinfo").read_text()
            if not quantised.exists():
                options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": not has_vnni}
                quantize_dynamic(path, quantised, **options)
            path = quantised
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self.session.run(None, batch)[0][:, 0]


class OpenVino(_Engine):
    """int8 is NNCF's post-training quantisation for transformers, calibrated on pairs of the benchmark itself."""

    def __init__(self, folder, dtype: str, max_length: int, calibration=()):
        import openvino

        super().__init__(folder, max_length)
        core = openvino.Core()
        model = core.read_model(exported(folder))
        if dtype == "int8":
            import nncf

            batches = [
                {name: batch[name].numpy() for name in INPUTS} for _, batch in self.batches(calibration, batch_size=4)
            ]
            model = nncf.quantize(
                model,
                nncf.Dataset(batches),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(batches),
            )
        precision = {"bf16": "bf16"}.get(dtype, "f32")
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.compiled = core.compile_model(model, "CPU", settings)

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self.compiled(batch)[0][:, 0]
