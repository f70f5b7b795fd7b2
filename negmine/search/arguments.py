"""The options of mine_hard_negatives, checked one by one, and described for the result and for a run that is to go on."""

import os
from dataclasses import asdict
from typing import Any

from negmine import checks
from negmine.options import is_real
from negmine.search.draw import STRATEGIES
from negmine.search.index import NegativeIndex

OP = "mine_hard_negatives"
# What decides which negatives come out; sizes and audits do not.
RUN = (
    "select", "range_mode", "positive_aggregation", "num_negatives", "sampling_strategy", "sampling_temperature", "seed",
    "deduplicate", "near_duplicate_score", "index", "count_skipped",
)  # fmt: skip
DESCRIBED = (*RUN, "audit_queries", "min_recall", "max_memory_bytes", "backend")


def checked(**options: Any) -> dict[str, Any]:
    """The options, or the refusal of the first that cannot be meant."""
    select, index = options["select"], options["index"]
    checks.require_options(OP, select=select)
    checks.require_choice(OP, "range_mode", options["range_mode"], ("filtered", "raw"))
    checks.require_choice(OP, "sampling_strategy", options["sampling_strategy"], STRATEGIES)
    checks.require_choice(OP, "positive_aggregation", options["positive_aggregation"], ("min", "max", "mean"))
    checks.require_choice(OP, "deduplicate", options["deduplicate"], ("none", "exact", "near"))
    checks.require_count(OP, "num_negatives", options["num_negatives"])
    checks.require_count(OP, "audit_queries", options["audit_queries"])
    checks.require_draw(OP, options["seed"], 0, 0)
    for name in ("count_skipped", "show_progress_bar"):
        checks.require_bool(OP, name, options[name])
    for name in ("batch_size", "corpus_chunk_size", "max_memory_bytes"):
        if options[name] is not None:
            checks.require_count(OP, name, options[name])
    temperature, near, least = (
        options[name] for name in ("sampling_temperature", "near_duplicate_score", "min_recall")
    )
    checks.require_number(OP, "sampling_temperature", temperature, above=0)
    if not is_real(near) or not 0 < near < 1:
        raise checks.refuse(OP, "near_duplicate_score", "a cosine above 0 and below 1", near)
    if not is_real(least) or not 0 <= least <= 1:
        raise checks.refuse(OP, "min_recall", "a share in [0, 1]", least)
    if select.sample is not None:
        raise checks.refuse(OP, "select", "without sample: num_negatives and sampling_strategy draw", select)
    if options["range_mode"] == "raw" and select.range_max is None:
        raise checks.refuse(OP, "select.range_max", "given where range_mode is 'raw'", None)
    if not isinstance(index, (str, NegativeIndex)) or index == "":
        raise checks.refuse(OP, "index", "'exact', a FAISS factory string, or a NegativeIndex", index, TypeError)
    if options["process_group"] is not None and getattr(index, "kind", index) != "exact":
        raise checks.refuse(OP, "index", "'exact' where process_group is given", index)
    if options["resume_dir"] is not None and not isinstance(options["resume_dir"], (str, os.PathLike)):
        raise checks.refuse(OP, "resume_dir", "the path of a folder", options["resume_dir"], TypeError)
    return options


def described(options: dict[str, Any], names: tuple[str, ...] = DESCRIBED) -> dict[str, Any]:
    """As JSON can say it."""
    given = {"select": asdict(options["select"]), "index": getattr(options["index"], "kind", options["index"])}
    return {name: given.get(name, options[name]) for name in names}
