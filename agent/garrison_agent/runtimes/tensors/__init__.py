"""The ONNX engine and the Open Inference Protocol."""
