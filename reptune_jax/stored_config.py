"""The config of a study that is there: `stored_config.py:runs/sentiment`."""

from pathlib import Path

from ml_collections import ConfigDict

from reptune_jax.config import also_behavior, default
from reptune_jax.folder import Study, read_config


def get_config(folder: str) -> ConfigDict:
    """What the study in `folder` was made with; which of its runs, and what is shown, is free.

    Raises:
      ValueError: there is no study.
    """
    study = Study(Path(folder))
    if not study.config.is_file():
        raise ValueError(
            f"workdir {folder}: holds no study, expected the folder of one. Name another, or give "
            "its --config."
        )
    c, stored = default(), read_config(study)
    for name in stored["loss"].get("also", ()):
        c.loss.also[name] = also_behavior("")  # JSON has no tuples: the schema says where they are
    with c.unlocked():
        c.update(stored)
    return c
