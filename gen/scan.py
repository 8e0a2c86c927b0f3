"""Writes `scan.onnx` beside itself: rows of a large label set, a byte a number, times queries -> cosines in float32.

ONNX Runtime has fast products of bytes on every processor we run on, which numpy has not, and a device has no `onnx`
package to build a graph with. Run with `requirements-dev.txt`: `python gen/scan.py`. See `vectorfile.Scan`.
"""

from pathlib import Path

from onnx import ModelProto, TensorProto, helper


def build() -> ModelProto:
    inputs = [
        helper.make_tensor_value_info("codes", TensorProto.UINT8, ["n", "dim"]),  # 128: nothing
        helper.make_tensor_value_info("scales", TensorProto.FLOAT, ["n", 1]),
        helper.make_tensor_value_info("parts", TensorProto.INT8, ["dim", "p"]),
        helper.make_tensor_value_info("steps", TensorProto.FLOAT, ["p", "b"]),
    ]
    nodes = [
        helper.make_node("MatMulInteger", ["codes", "parts", "zero"], ["products"]),
        helper.make_node("Cast", ["products"], ["products32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["products32", "steps"], ["turned"]),
        helper.make_node("Mul", ["turned", "scales"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["cosines"], perm=[1, 0]),
    ]
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [128])
    cosines = helper.make_tensor_value_info("cosines", TensorProto.FLOAT, ["b", "n"])
    graph = helper.make_graph(nodes, "scan", inputs, [cosines], [zero])
    # The oldest versions that have all of it, so that any ONNX Runtime reads it.
    return helper.make_model(
        graph, producer_name="lumen-clip", ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )


if __name__ == "__main__":
    Path(__file__).with_name("scan.onnx").write_bytes(build().SerializeToString(deterministic=True))
