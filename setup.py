"""The packages of polyrep, whose source folder is ``modeling``; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=["polyrep", *(f"polyrep.{name}" for name in find_packages("modeling"))]
    + ["polyrep.hub_configs", "polyrep.model_cards"]
)
