"""Export, inspect, open through every door, upload."""

from .export import export_onnx
from .publish import PublishArguments, publish_folder

__all__ = ["PublishArguments", "export_onnx", "publish_folder"]
