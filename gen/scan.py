"""Writes `scan.onnx` beside itself: float16 rows of a large label set times float32 queries -> cosines in float32.

numpy turns float16 into float32 at a tenth of the memory's speed; ONNX Runtime has the processor's own instructions for
it, and a device has no `onnx` package to build a graph with. The rows come in blocks, one after the other through the
loop, so that what becomes of a block stays in the core's cache. Queries come as groups of columns, with a product for
each group. Run with `requirements-dev.txt`: `python gen/scan.py`. See `labels.Cosines`.
"""

from pathlib import Path

from onnx import ModelProto, TensorProto, helper


def build() -> ModelProto:
    block = helper.make_graph(
        [
            helper.make_node("Cast", ["block"], ["block32"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["block32", "queries"], ["products"]),  # queries: of the graph around
            helper.make_node("Transpose", ["products"], ["found"], perm=[0, 2, 1]),
        ],
        "block",
        [helper.make_tensor_value_info("block", TensorProto.FLOAT16, ["rows", "dim"])],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, ["groups", "columns", "rows"])],
    )
    nodes = [
        helper.make_node("Scan", ["blocks"], ["all_found"], body=block, num_scan_inputs=1),
        helper.make_node("Transpose", ["all_found"], ["cosines"], perm=[1, 2, 0, 3]),
    ]
    inputs = [
        helper.make_tensor_value_info("blocks", TensorProto.FLOAT16, ["blocks", "rows", "dim"]),
        helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["groups", "dim", "columns"]),
    ]
    cosines = helper.make_tensor_value_info("cosines", TensorProto.FLOAT, ["groups", "columns", "blocks", "rows"])
    graph = helper.make_graph(nodes, "scan", inputs, [cosines])
    # The oldest versions that have all of it, so that any ONNX Runtime reads it.
    return helper.make_model(
        graph, producer_name="lumen-clip", ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )


if __name__ == "__main__":
    Path(__file__).with_name("scan.onnx").write_bytes(build().SerializeToString(deterministic=True))
