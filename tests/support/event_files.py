"""A run's TensorBoard events, read by TensorBoard itself."""

import functools

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.backend_context import Context
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


def hparams_tab(study):
    """The rows of the HPARAMS tab over a study's folder, as its server answers."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(study))
    provider = MultiplexerDataProvider(runs.Reload(), str(study))
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=99,
        aggregation_type=api_pb2.AGGREGATION_AVG,
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN],
    )
    tab = Context(TBContext(data_provider=provider))
    return list_session_groups.Handler(RequestContext(), tab, "", request).run().session_groups
