"""From a traced program to the nodes and constants of an ONNX graph; `onnx_model` makes the file.

`lowering` walks the program and calls one rule a primitive (`rules_*`), on arrays whose axes lie in
any order (`values`, `graph`); `rewrites` and `affine` then make the graph smaller.
"""
