"""What is kept of a study when its folder is gone: config, vector, tables, results, provenance.

results/sentiment/          a study folder again: `reptune report results/sentiment` reads it
  README.md                 where it comes from, and every table of the report
  summary.json              dual by the primary measure, and against each rival
  config.json
  vector.safetensors        the behavior's, for `rt.SteeringVector.load`
  results/items.parquet     unless it is large
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reptune_jax import folder as folders
from reptune_jax.evals.results import SCHEMA
from reptune_jax.hub.export import all_or_nothing
from reptune_jax.hub.side_files import public_name
from reptune_jax.report import markdown, outcomes
from reptune_jax.report import study as studies
from reptune_jax.report.blocks import divergence, interval
from reptune_jax.report.study import BASE, Study
from reptune_jax.vectors.steering_vector import SteeringVector

_LARGE = 4 << 20  # bytes of per-item results


def keep(study: Study, to: Path, note: str = "") -> Path:
    """Writes what is kept into a new folder; `note` is how it came about: command, machine, time.

    Raises:
      ValueError: the folder is there and not empty.
    """
    with all_or_nothing(to) as scratch:
        kept = folders.Study(scratch)
        config = json.loads(json.dumps(study.config))
        values = config.setdefault("config", {})
        values |= {key: public_name(str(values.get(key, ""))) for key in ("model", "behavior")}
        for one in (values.get("loss") or {}).get("also", {}).values():
            one["folder"] = public_name(one["folder"])
        kept.config.write_text(_as_json(config), encoding="utf-8")
        if study.folder.vector.exists():
            vector = SteeringVector.load(study.folder.vector)
            meta = vector.meta | {"model": public_name(str(vector.meta.get("model", "")))}
            dataclasses.replace(vector, meta=meta).save(kept.vector)
        kept.items.parent.mkdir()
        rows = pa.Table.from_pandas(study.rows[SCHEMA.names], SCHEMA, preserve_index=False)
        pq.write_table(rows, kept.items, compression="zstd")
        digest = hashlib.sha256(kept.items.read_bytes()).hexdigest()
        items = f"{len(study.rows):,} per-item results, sha256 {digest[:16]}"
        if kept.items.stat().st_size > _LARGE:
            kept.items.unlink()
            items += " (not kept: too large)"
        versions = ", ".join(f"{k} {v}" for k, v in config.get("versions", {}).items())
        about = [
            note,
            f"{values['model']}, {values['behavior']}, seeds "
            + ", ".join(map(str, sorted(set(study.rows.seed)))),
            f"commit {config.get('commit') or 'unknown'}, {config.get('device', 'device unknown')}",
            versions,
            items,
        ]
        lines = [f"# {to.name}", "", *(f"- {line}" for line in about if line), ""]
        (scratch / "summary.json").write_text(_as_json(summary(study)), encoding="utf-8")
        text = "\n".join([*lines, markdown.render(study)])
        (scratch / "README.md").write_text(text, encoding="utf-8")
    return to


def summary(study: Study) -> dict[str, Any]:
    """What README's table says of a study: intervals as the report has them."""
    measure, known = study.primary, outcomes.outcomes(study)
    if measure is None:
        return {}
    rows = study.measured(BASE, measure, "test")
    frame = outcomes.family_frame(study, measure)
    dual = [setting for setting in known if setting.arm == "dual"]
    return {
        "behavior": ", ".join(sorted(set(study.rows.behavior))),
        "model": public_name(str(studies.config_value(study.config, "model"))),
        "primary": measure.label,
        "items": rows.item_id.nunique(),
        "seeds": study.rows[study.rows.arm == "dual"].seed.nunique(),
        "dual": [
            {
                "sign": setting.sign,
                "outcome": known[setting].word,
                "delta": interval(studies.interval(study.delta(setting, BASE, measure, "test"))),
                "kl": divergence(study.kl(setting)),
                "against": {
                    r.rival.arm: {"advantage": interval(r.advantage), "verdict": r.verdict}
                    for r in frame.itertuples()
                    if r.dual == setting and r.rival != BASE
                },
            }
            for setting in dual
        ],
    }


def _as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
