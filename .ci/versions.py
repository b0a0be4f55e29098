"""Print the versions of Python and of the packages that steerkit computes with."""

import platform
from importlib import metadata

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "pandas", "scikit-learn", "trl", "datasets")
print(", ".join([f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in PACKAGES)]))
