"""What a caller hands over, checked once at the door: ids, masks, rows, texts, numbers.

On the host, and in numpy: a lookup with an id that is not there gives NaN or another token's row, a
hole in a mask shifts positions, and both without a word. Tracers, and arrays of which this process
holds a part only, are taken as they are.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from reptune_jax.model.intervene import Steer


def token_arrays(
    tokens_BxT: Any, mask_BxT: Any, V: int, left: bool = False
) -> tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]:
    """(tokens, mask), int32 [B, T]; without a mask all tokens are real. `left`: padded there only.

    Raises:
      ValueError: not ids of a vocabulary of V; or a mask that is not one run of 1 in every row.
    """
    tokens_BxT, mask_BxT = _array("tokens_BxT", tokens_BxT), _array("mask_BxT", mask_BxT)
    if tokens_BxT.ndim != 2 or not tokens_BxT.size:
        raise ValueError(
            f"tokens_BxT: got shape {list(tokens_BxT.shape)}, expected [B, T] with at least one "
            "row and one token. One text is one row: [ids]."
        )
    _ids("tokens_BxT", tokens_BxT, V)
    if mask_BxT is None:
        return _int32(tokens_BxT), np.ones(tokens_BxT.shape, np.int32)
    if mask_BxT.shape != tokens_BxT.shape:
        raise ValueError(
            f"mask_BxT: got shape {list(mask_BxT.shape)}, expected that of the tokens, "
            f"{list(tokens_BxT.shape)}."
        )
    if (mask := _host(mask_BxT)) is not None:
        _runs(mask, left)
    return _int32(tokens_BxT), _int32(mask_BxT)


def token_rows(rows: Any, V: int, steer: Any = None, context: int | None = None) -> list[list[int]]:
    """Rows of ids, each of at most `context`.

    Raises:
      ValueError: no rows of ids of a vocabulary of V; an empty or too long one; a steer that is
        bound to a batch, where rows will be sorted and padded.
    """
    if isinstance(steer, Steer):
        raise ValueError(
            "steer: got a Steer, which is bound to the rows and columns of one batch, expected a "
            "SteeringVector where rows are sorted and padded. Use `forward` or `generate_ids`."
        )
    advice = "Ids of one text are one row: [ids]; text goes to `generate` and `loglikelihood`."
    if isinstance(rows, str) or any(isinstance(row, str) or np.ndim(row) != 1 for row in rows):
        raise ValueError(f"rows of ids: got {_short(rows)}, expected lists of token ids. {advice}")
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(
                f"prompt {i}: got no tokens, expected at least one. Give it some text."
            )
        if context is not None and len(row) > context:
            raise ValueError(
                f"prompt {i}: got {len(row):,} tokens, expected at most {context:,}, the model's "
                f"context (max_position_embeddings). Cut {len(row) - context:,} off; nothing is "
                "cut without being asked for."
            )
        _ids(f"prompt {i}", np.asarray(row), V)
    return [row if isinstance(row, list) else np.asarray(row).tolist() for row in rows]


def starts(of_rows: Any, rows: Sequence[Sequence[int]]) -> list[int]:
    """Of each row, the first token that is scored.

    Raises:
      ValueError: not one a row; or a row without a token before it, or from it on.
    """
    if len(of_rows) != len(rows):
        raise ValueError(f"starts: got {len(of_rows)} for {len(rows)} rows, expected one a row.")
    for i, (start, row) in enumerate(zip(of_rows, rows, strict=True)):
        if not _whole(start) or not 0 < start < len(row):
            raise ValueError(
                f"starts: got {start!r} for row {i} of {len(row)} tokens, expected 1 to "
                f"{len(row) - 1}: something before it, and something to score."
            )
    return [int(start) for start in of_rows]


def candidates(candidates_IxC: Any, rows: int, V: int) -> np.ndarray:
    """Ids to choose among, int32 [I, C].

    Raises:
      ValueError: not one row of ids for each prompt.
    """
    ids_IxC = np.asarray(_array("candidates_IxC", candidates_IxC))
    if ids_IxC.ndim != 2 or len(ids_IxC) != rows:
        raise ValueError(
            f"candidates_IxC: got shape {list(ids_IxC.shape)}, expected [{rows}, C], a row of "
            "token ids for each prompt."
        )
    _ids("candidates_IxC", ids_IxC, V)
    return ids_IxC.astype(np.int32)


def prompts(given: Any) -> list[Any]:
    """Texts or chats; one of either is no list of them.

    Raises:
      ValueError: one text, one chat, or something else.
    """
    found, wrap = _listed(given), ""
    if found is None:
        wrap = "A single one is [prompt]."
    elif any(isinstance(prompt, dict) for prompt in found):
        wrap = "The turns of a single chat are [turns]."
    elif not all(isinstance(prompt, str) or _is_chat(prompt) for prompt in found):
        wrap = "Token ids go to `generate_each`."
    if wrap:
        raise ValueError(
            f"prompts: got {_short(given)}, expected a list of texts or of chats (lists of "
            f"{{'role', 'content'}}). {wrap}"
        )
    return found or []


def text_pairs(given: Any) -> list[tuple[str, str]]:
    """(context, continuation) texts.

    Raises:
      ValueError: one text or one pair, where a list of pairs is expected.
    """
    pairs = _listed(given)
    if pairs is None or not all(
        isinstance(p, tuple | list) and len(p) == 2 and all(isinstance(t, str) for t in p)
        for p in pairs
    ):
        raise ValueError(
            f"pairs: got {_short(given)}, expected a list of (context, continuation) texts. A "
            "single one is [(context, continuation)]."
        )
    return [(context, continuation) for context, continuation in pairs]


def counts(**whole: Any) -> None:
    """Raises ValueError where one is not a whole number from 1 on."""
    for name, value in whole.items():
        if not _whole(value) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a whole number from 1 on.")


def _listed(given: Any) -> list[Any] | None:
    """None for what is no list of several, though it may be iterated over."""
    return None if isinstance(given, str | dict) or not isinstance(given, Iterable) else [*given]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and all(isinstance(turn, dict) for turn in prompt)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _array(name: str, value: Any) -> Any:
    if value is None or isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError:  # numpy has no ragged arrays
        raise ValueError(
            f"{name}: got rows of unequal length, expected [B, T]. Pad them and say so in a mask, "
            "or use `generate_each`, which takes rows as they are."
        ) from None


def _host(array: Any) -> np.ndarray | None:
    """None where looking would not be possible here."""
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def _ids(name: str, array: Any, V: int) -> None:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: got {array.dtype}, expected whole numbers, the ids that a tokenizer gives."
        )
    ids = _host(array)
    if ids is not None and ids.size and (ids.min() < 0 or ids.max() >= V):
        wrong = ids[(ids < 0) | (ids >= V)]
        raise ValueError(
            f"{name}: got id {int(wrong.flat[0])}, expected ids from 0 to {V - 1}, the model's "
            "vocabulary. Padding needs an id of it too; what the mask leaves out is not read."
        )


def _runs(mask_BxT: np.ndarray, left: bool) -> None:
    """Every row: one run of 1 among 0, at the end where padding is `left`."""
    if ((mask_BxT != 0) & (mask_BxT != 1)).any():
        raise ValueError(
            f"mask_BxT: got {np.unique(mask_BxT)[:5].tolist()}, expected 1 on real tokens and 0 "
            "on padding."
        )
    real_BxT = mask_BxT.astype(np.int8)
    runs_B = (np.diff(real_BxT, axis=1, prepend=0) == 1).sum(1)
    if (bad := np.flatnonzero(runs_B != 1)).size:
        found = "holes" if runs_B[bad[0]] else "padding only"
        raise ValueError(
            f"mask_BxT: row {bad[0]} has {found}, expected its real tokens side by side. Leave "
            "out what is no text, and pad at one end."
        )
    if left and not real_BxT[:, -1].all():
        row = int(np.flatnonzero(real_BxT[:, -1] == 0)[0])
        raise ValueError(
            f"mask_BxT: row {row} ends in padding, expected padding on the left, so that what is "
            "generated follows the text. `model.padding.pad(ids, pad_id, left=True)` makes it."
        )


def _int32(array: Any) -> Any:
    return array if array.dtype == np.int32 else array.astype(np.int32)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
