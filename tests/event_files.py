"""A run's TensorBoard events, read by TensorBoard itself."""

import functools

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.util.tensor_util import make_ndarray


@functools.cache
def read(folder):
    """As the server sees them: what a restart repeats is there once."""
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    return found.Reload()


def of_plugin(folder, name):
    """{(step, tag): array} of one of TensorBoard's plugins."""
    found = read(folder)
    return {
        (event.step, tag): make_ndarray(event.tensor_proto)
        for tag in found.PluginTagToContent(name)
        for event in found.Tensors(tag)
    }


def hparams_of(folder, tag):
    """The HPARAMS tab's data under one of its three tags."""
    content = read(folder).PluginTagToContent(hparams.PLUGIN_NAME)[tag]
    parse = {
        hparams.EXPERIMENT_TAG: hparams.parse_experiment_plugin_data,
        hparams.SESSION_START_INFO_TAG: hparams.parse_session_start_info_plugin_data,
        hparams.SESSION_END_INFO_TAG: hparams.parse_session_end_info_plugin_data,
    }
    return parse[tag](content)
