"""The text of a report: findings, recommendations, and the table by difficulty.

The thresholds at which a sentence changes are judgements; they are the constants below.
"""

from typing import Any

import numpy as np

UNIT = 0.01  # norms within this of 1 are unit rows
CONSISTENT = 0.01  # correlation of two queries' choices
STALE = 0.5  # share of the hardest tail that two snapshots have in common
CLEAN_CLASS = 0.05  # share of same-class negatives that a window may start with
MARGIN = 0.05  # relative margin whose effect is told

Figures = dict[str, np.ndarray]
Facts = dict[str, Any]
COPIES = {
    True: 'corpus_texts=, so that copies of one text are one document; deduplicate="near" drops what is nearly equal, too.',
    False: 'deduplicate="near" if rows repeat: "exact" does not see copies of a text whose embeddings differ in the last bits. '
    "With corpus_texts= equal texts are one document.",
}


def percent(share: float) -> str:
    """0.00001 -> 0.001 %, with no more digits than it has."""
    return f"{100 * share:.3g} %" if share < 0.9995 or share == 1 else f"{100 * share:.4g} %"


def score_word(facts: Facts) -> str:
    return "cosine" if is_unit(facts) else "score"


def is_unit(facts: Facts) -> bool:
    return all(abs(norm - 1) <= UNIT for pair in facts["norms"] for norm in pair)


def bounds(figures: Figures) -> np.ndarray:
    """The edges, as they part what was seen: a bin after empty ones begins at 0, since they hold no rank."""
    edges, known = figures["edges"].copy(), known_bins(figures, "score")
    edges[: known[0] + 1], edges[known[-1] + 1 :] = 0.0, 1.0
    return edges


def bin_name(figures: Figures, i: int) -> str:
    first, last = bounds(figures)[i : i + 2]
    return f"{percent(float(first))} to {percent(float(last))}"


def known_bins(figures: Figures, name: str) -> np.ndarray:
    """Numbers of the bins that hold a value."""
    return np.flatnonzero(np.isfinite(figures[f"{name}_mean"]))


def shown(figures: Figures, facts: Facts) -> list[tuple[str, str, float]]:
    """Figure, title and chance of each curve by difficulty; NaN where chance has no meaning."""
    curves = [("score", score_word(facts), float("nan"))]
    if "same_class_mean" in figures:
        curves.append(("same_class", "same class", float(figures["same_class_chance"])))
    for name in facts["similarities"]:
        curves.append((f"similarity/{name}", name, float(figures[f"similarity/{name}_overall"])))
    return curves


def table(figures: Figures, facts: Facts) -> list[str]:
    """Lines: a bin of difficulty each, with the mean of every curve."""
    curves = shown(figures, facts)
    widths = [max(12, len(title)) + 2 for _, title, _ in curves]
    lines = [f"{'hardest ... easiest':<20}"]
    lines[0] += "".join(f"{title:>{width}}" for (_, title, _), width in zip(curves, widths, strict=True))
    for i in known_bins(figures, "score"):
        values = [figures[f"{name}_mean"][i] for name, _, _ in curves]
        cells = [f"{value:>{width}.4f}" for value, width in zip(values, widths, strict=True)]
        lines.append(f"{bin_name(figures, i):<20}" + "".join(cells))
    return lines


def _tails(figures: Figures, name: str, title: str, overall: float) -> list[str]:
    """How a curve runs from the hardest to the easiest, and whether the easiest end turns up again."""
    known = known_bins(figures, name)
    if len(known) < 2:
        return []
    mean, error, edges = figures[f"{name}_mean"], figures[f"{name}_error"], bounds(figures)
    first, last = known[0], known[-1]
    lowest = known[int(mean[known].argmin())]
    values = [percent(v) if name == "same_class" else f"{v:.3g}" for v in (mean[first], overall, mean[last])]
    sentences = [
        f"{title[0].upper()}{title[1:]}: {values[0]} among the hardest {percent(float(edges[first + 1]))}, "
        f"{values[1]} over the whole pool, {values[2]} among the easiest {percent(1 - float(edges[last]))}."
    ]
    gap, noise = float(mean[last] - mean[lowest]), 2 * float(np.hypot(error[last], error[lowest]))
    if gap > noise:
        sentences[0] += (
            f" Towards the easiest it rises again, {gap:.2g} above the bin {bin_name(figures, int(lowest))} (two standard errors "
            f"are {noise:.2g}): opposite directions still hold kin."
        )
    elif np.isfinite(noise):
        sentences[0] += " Towards the easiest it does not rise again."
    return sentences


def findings(figures: Figures, facts: Facts) -> list[str]:
    """The findings, one sentence each."""
    sentences = []
    if facts["has_positives"]:
        rank = figures["positive_rank"][figures["positive_rank"] > 0]
        sentences.append(
            f"The best positive comes first for {percent(float((rank == 1).mean()))} of the queries; its median rank is "
            f"{int(np.median(rank)):,} of {facts['corpus_rows']:,}. Of the hardest ten negatives "
            f"{figures['outscoring_mean']:.1f} outscore it on average."
        )
    for name, title, overall in shown(figures, facts)[1:]:
        sentences += _tails(figures, name, title, overall)
    Q = len(figures["queries"])
    for side, counts in (("hard", "hardest"), ("easy", "easiest")):
        ratio, most = float(figures[f"{side}_variance_ratio"]), int(figures[f"{side}_count"].max())
        never = int((figures[f"{side}_count"] == 0).sum())
        sentences.append(
            f"How often a row is among the {counts} {percent(facts['arguments']['tail'])} varies {ratio:.3g} times as much as "
            f"if queries chose by themselves (their choices correlate at {float(figures[f'{side}_agreement']):.3f}): one row is "
            f"there for {most:,} of {Q:,} queries, {never:,} rows for none."
        )
    if "overlap" in figures:
        sizes, kept = figures["overlap_sizes"], np.nanmean(figures["overlap"], axis=0)
        parts = ", ".join(f"{percent(float(o))} of the hardest {n:,}" for n, o in zip(sizes, kept, strict=True))
        sentences.append(
            f"Since the older snapshot: {parts} are the same; the order of all rows correlates at "
            f"{np.nanmean(figures['rank_correlation']):.3f} (Spearman)."
        )
    return sentences


def _margin_drops(figures: Figures) -> float:
    """Share of the hardest ten of each query that a relative margin of MARGIN would drop."""
    gap = figures["top_margins"]  # (queries with a positive, 10)
    positive = figures["positive_score"][~np.isnan(figures["positive_score"])]
    real = np.isfinite(gap)
    return float(((gap > -MARGIN * np.abs(positive)[:, None]) & real).sum() / max(1, real.sum()))


def advice(figures: Figures, facts: Facts) -> list[str]:
    """Recommendations, one sentence each."""
    sentences = []
    if not is_unit(facts):
        low, high = (f(norm for pair in facts["norms"] for norm in pair) for f in (min, max))
        sentences.append(
            f"Rows have norms from {low:.3g} to {high:.3g}, so scores are no cosines: normalize=True makes them so."
        )
    if facts["has_positives"] and figures["outscoring_rate"] > 0:
        sentences.append(
            f"{percent(float(figures['outscoring_rate']))} of the queries have a negative above every known positive: read the "
            f"suspects below. If they answer the query, mine with Select(relative_margin={MARGIN}), which would drop "
            f"{percent(_margin_drops(figures))} of the hardest ten; if they do not, they are what training should see."
        )
    if figures["near_duplicates"] > 0:
        sentences.append(
            f"{int(figures['near_duplicates']):,} rows score {facts['arguments']['near_duplicate_score']:g} or more with a "
            f"positive. Give the true ones as positives or exclude=, and mine with {COPIES[facts['has_texts']]}"
        )
    if "same_class_mean" in figures:
        rate, chance = figures["same_class_mean"], float(figures["same_class_chance"])
        known, limit = known_bins(figures, "same_class"), max(CLEAN_CLASS, 2 * chance)
        over = [i for i in known if rate[i] > limit]
        if over:
            start = float(figures["edges"][over[-1] + 1])
            skip = f", or leave out the hardest {percent(start)} with Select({start:g}, None)" if start < 1 else ""
            sentences.append(
                f"If a negative of the query's own class is a false one: {percent(float(rate[known[0]]))} of the hardest are, "
                f"{percent(chance)} by chance. Mask them by label (query_labels, negative_labels){skip}."
            )
    if figures["hard_agreement"] > CONSISTENT:
        sentences.append(
            "Some rows are hard for many queries at once: read the rows listed as hardest most often. If they are boilerplate, "
            'drop them from the corpus; else sampling_strategy="random" over a window spreads the choice.'
        )
    if "overlap" in figures:
        kept = float(np.nanmean(figures["overlap"][:, -1]))
        verdict = "mine again" if kept < STALE else "the mined negatives still serve"
        sentences.append(f"{percent(kept)} of the hardest tail is what it was: {verdict}.")
    return sentences or ["Nothing here asks for a change."]
