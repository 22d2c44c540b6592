"""TensorBoard's event files, by its own protos: TensorFlow is not needed."""

import itertools
import os
import socket
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
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from reptune_jax import ending, roles

_NAME = "events.out.tfevents."  # then when it was begun, by which TensorBoard orders files


class Events:
    """One event file of a run, which begins (again) after step `since`.

    Its times come after those of earlier files, also where a clock was set back since.
    """

    def __init__(self, folder: Path, since: int):
        now = time.time()
        began = max([now, *(_last_time(path) + 1 for path in folder.glob(f"{_NAME}*"))])
        self._ahead = began - now
        who = f"{socket.gethostname()}.{os.getpid()}"
        names = (folder / f"{_NAME}{int(began):010d}.{who}.{n}" for n in itertools.count())
        self._path = next(path for path in names if not path.exists())
        with ending.of_file(self._path):
            self._file = self._path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # TensorBoard drops older events from this step on.
        self._write(step=since + 1, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        """Closes the file."""
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
        first = roles.keys_of("run")  # what differs is shown first
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
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **event: Any) -> None:
        """At once, as metrics.jsonl: a kill loses neither."""
        made = Event(wall_time=time.time() + self._ahead, **event)
        with ending.of_file(self._path):
            self._records.write(made.SerializeToString())
            self._records.flush()


def _last_time(path: Path) -> float:
    """Of the last event in a file, or later."""
    began = path.name.removeprefix(_NAME).partition(".")[0]
    return max(path.stat().st_mtime, float(began) if began.isdigit() else 0.0)


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
    trains = roles.without(dict(config), "measure", "study", "declared", "passing", "shown")
    flat = traverse_util.flatten_dict(trains, sep=".")
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat.items()}
