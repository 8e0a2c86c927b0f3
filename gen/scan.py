"""Writes `scan.onnx` beside itself: float16 rows of a large label set times float32 queries -> cosines in float32.

numpy turns float16 into float32 at a tenth of the memory's speed; ONNX Runtime has the processor's own instructions for
it, and a device has no `onnx` package to build a graph with. Run with `requirements-dev.txt`: `python gen/scan.py`. See
`vectorfile.Scan`.
"""

from pathlib import Path

from onnx import ModelProto, TensorProto, helper


def build() -> ModelProto:
    inputs = [
        helper.make_tensor_value_info("rows", TensorProto.FLOAT16, ["n", "dim"]),
        helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["dim", "b"]),
    ]
    nodes = [
        helper.make_node("Cast", ["rows"], ["rows32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["rows32", "queries"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["cosines"], perm=[1, 0]),
    ]
    cosines = helper.make_tensor_value_info("cosines", TensorProto.FLOAT, ["b", "n"])
    graph = helper.make_graph(nodes, "scan", inputs, [cosines])
    # The oldest versions that have all of it, so that any ONNX Runtime reads it.
    return helper.make_model(
        graph, producer_name="lumen-clip", ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )


if __name__ == "__main__":
    Path(__file__).with_name("scan.onnx").write_bytes(build().SerializeToString(deterministic=True))
