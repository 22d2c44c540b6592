"""TensorBoard's event files, by its own protos: TensorFlow is not needed."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram import metadata as histogram
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from reptune_jax import config as configs


class Events:
    """One event file of a run, which begins (again) after step `since`."""

    def __init__(self, folder: Path, since: int):
        self._file = EventFileWriter(str(folder))
        # TensorBoard drops older events from this step on.
        start = SessionLog(status=SessionLog.START)
        self._file.add_event(Event(step=since + 1, wall_time=time.time(), session_log=start))

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event of plain numbers."""
        self._add(step, *(Summary.Value(tag=k, simple_value=v) for k, v in values.items()))

    def histogram(self, step: int, tag: str, bucket_Kx3: np.ndarray) -> None:
        """Rows of (left edge, right edge, count)."""
        about = histogram.create_summary_metadata(display_name=None, description=None)
        rows = make_tensor_proto(bucket_Kx3, dtype=np.float64)
        self._add(step, Summary.Value(tag=tag, metadata=about, tensor=rows))

    def image(self, step: int, tag: str, png: bytes) -> None:
        """A PNG; its size is read from its header."""
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        image = Summary.Image(width=width, height=height, colorspace=4)  # 4: RGBA
        image.encoded_image_string = png
        self._add(step, Summary.Value(tag=tag, image=image))

    def hparams(self, run: str, values: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """The run as a row of the HPARAMS tab, with the last value of each of these scalars."""
        first = configs.keys_of("run")  # what differs is shown first
        columns = [
            api_pb2.HParamInfo(name=k, type=_kind(v), differs=k in first) for k, v in values.items()
        ]
        shown = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=k)) for k in metrics]
        about = api_pb2.Experiment(hparam_infos=columns, metric_infos=shown)
        self._add(0, _of_hparams(hparams.EXPERIMENT_TAG, experiment=about))
        self._add(0, *summary_v2.hparams_pb(values, trial_id=run).value)

    def finished(self) -> None:
        """Marks that row as done; without it TensorBoard calls the run unfinished."""
        done = api_pb2.STATUS_SUCCESS
        end = plugin_data_pb2.SessionEndInfo(status=done, end_time_secs=time.time())
        self._add(0, _of_hparams(hparams.SESSION_END_INFO_TAG, session_end_info=end))

    def _add(self, step: int, *values: Summary.Value) -> None:
        self._file.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))


def _of_hparams(tag: str, **data: Any) -> Summary.Value:
    """The plugin keeps everything in the metadata of a value that says nothing."""
    about = hparams.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**data))
    return Summary.Value(tag=tag, metadata=about, tensor=hparams.NULL_TENSOR)


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's training depends on, as the HPARAMS tab takes it: numbers, booleans, texts."""
    trains = configs.without(dict(config), "measure", "study", "declared", "passing", "shown")
    flat = traverse_util.flatten_dict(trains, sep=".")
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat.items()}
