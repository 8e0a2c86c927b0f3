"""Writes `scoring.onnx` beside itself: float16 rows and float32 queries -> their dot products, in float32.

ONNX Runtime converts half precision at the speed of memory, which numpy does not, and a device has no `onnx` package to
build a graph with. Run with `requirements-dev.txt`: `python gen/scoring.py`.
"""

from pathlib import Path

from onnx import ModelProto, TensorProto, helper


def build() -> ModelProto:
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT16, ["n", "dim"])
    queries = helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["dim", "b"])
    products = helper.make_tensor_value_info("products", TensorProto.FLOAT, ["n", "b"])
    nodes = [
        helper.make_node("Cast", ["rows"], ["rows32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["rows32", "queries"], ["products"]),
    ]
    graph = helper.make_graph(nodes, "scoring", [rows, queries], [products])
    # The oldest versions that have all of it, so that any ONNX Runtime reads it.
    return helper.make_model(
        graph, producer_name="lumen-clip", ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )


if __name__ == "__main__":
    Path(__file__).with_name("scoring.onnx").write_bytes(build().SerializeToString(deterministic=True))
