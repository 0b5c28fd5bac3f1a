"""ONNX graphs: their layers and files, and their rewrites to float16, Q and DQ, and tables in few bits."""
