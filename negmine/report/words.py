"""Write the text of a report: findings, recommendations, and the table by difficulty.

The constants below are the thresholds at which sentences change. We chose them by judgement.
"""

from typing import Any

import numpy as np

UNIT = 0.01  # rows count as unit rows if their norms differ from 1 by at most this
CONSISTENT = 0.01  # correlation between two queries' choices
STALE = 0.5  # share of the hardest tail that both snapshots have
CLEAN_CLASS = 0.05  # acceptable share of same-class negatives at the start of a window
MARGIN = 0.05  # relative margin that the advice proposes

Figures = dict[str, np.ndarray]
Facts = dict[str, Any]
COPIES = {
    True: 'corpus_texts=, so that copies of one text are one document; deduplicate="near" also removes nearly equal rows.',
    False: 'deduplicate="near" if rows repeat: "exact" does not see copies of a text whose embeddings differ in the last bits. '
    "With corpus_texts= equal texts are one document.",
}


def percent(share: float) -> str:
    """A share as a percentage: 0.00001 becomes 0.001 %."""
    return f"{100 * share:.3g} %" if share < 0.9995 or share == 1 else f"{100 * share:.4g} %"


def score_word(facts: Facts) -> str:
    return "cosine" if is_unit(facts) else "score"


def is_unit(facts: Facts) -> bool:
    return all(abs(norm - 1) <= UNIT for pair in facts["norms"] for norm in pair)


def bounds(figures: Figures) -> np.ndarray:
    """The edges that separate the sampled ranks. A bin after empty bins starts at 0, because empty bins have no rank."""
    edges, known = figures["edges"].copy(), known_bins(figures, "score")
    edges[: known[0] + 1], edges[known[-1] + 1 :] = 0.0, 1.0
    return edges


def bin_name(figures: Figures, i: int) -> str:
    first, last = bounds(figures)[i : i + 2]
    return f"{percent(float(first))} to {percent(float(last))}"


def known_bins(figures: Figures, name: str) -> np.ndarray:
    """The numbers of the bins that have a value."""
    return np.flatnonzero(np.isfinite(figures[f"{name}_mean"]))


def shown(figures: Figures, facts: Facts) -> list[tuple[str, str, float]]:
    """Figure, title and chance level of each curve by difficulty; NaN if there is no chance level."""
    curves = [("score", score_word(facts), float("nan"))]
    if "same_class_mean" in figures:
        curves.append(("same_class", "same class", float(figures["same_class_chance"])))
    for name in facts["similarities"]:
        curves.append((f"similarity/{name}", name, float(figures[f"similarity/{name}_overall"])))
    return curves


def table(figures: Figures, facts: Facts) -> list[str]:
    """The lines of a table: one per bin of difficulty, with the mean of each curve."""
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
    """Sentences on how a curve goes from hardest to easiest, and whether it rises again at the easiest end."""
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
            f"are {noise:.2g}): rows in opposite directions can be related."
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
            f"if queries chose independently (their choices correlate at {float(figures[f'{side}_agreement']):.3f}): one row is "
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
    """The share of the hardest ten of each query that a relative margin of MARGIN would remove."""
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
            f"Rows have norms from {low:.3g} to {high:.3g}, so scores are not cosines; normalize=True makes them cosines."
        )
    if facts["has_positives"] and figures["outscoring_rate"] > 0:
        sentences.append(
            f"{percent(float(figures['outscoring_rate']))} of the queries have a negative above every known positive: read the "
            f"suspects below. If they answer the query, mine with Select(relative_margin={MARGIN}), which would remove "
            f"{percent(_margin_drops(figures))} of the hardest ten; if they do not, they are useful negatives."
        )
    if figures["near_duplicates"] > 0:
        sentences.append(
            f"{int(figures['near_duplicates']):,} rows score {facts['arguments']['near_duplicate_score']:g} or more with a "
            f"positive. Pass those that are right answers as positives or exclude=, and mine with {COPIES[facts['has_texts']]}"
        )
    if "same_class_mean" in figures:
        rate, chance = figures["same_class_mean"], float(figures["same_class_chance"])
        known, limit = known_bins(figures, "same_class"), max(CLEAN_CLASS, 2 * chance)
        over = [i for i in known if rate[i] > limit]
        if over:
            start = float(figures["edges"][over[-1] + 1])
            skip = f", or leave out the hardest {percent(start)} with Select({start:g}, None)" if start < 1 else ""
            sentences.append(
                f"{percent(float(rate[known[0]]))} of the hardest negatives are of the query's own class; by chance "
                f"{percent(chance)} would be. If these are false negatives, mask them by label (query_labels of the loss, "
                f"and labels of its Negatives){skip}."
            )
    if figures["hard_agreement"] > CONSISTENT:
        sentences.append(
            "Some rows are hard for many queries at once: read the rows listed as hardest most often. If they are boilerplate, "
            'remove them from the corpus; otherwise sampling_strategy="random" over a window selects them less often.'
        )
    if "overlap" in figures:
        kept = float(np.nanmean(figures["overlap"][:, -1]))
        verdict = "mine again" if kept < STALE else "the mined negatives are still good"
        sentences.append(f"{percent(kept)} of the hardest tail is unchanged: {verdict}.")
    return sentences or ["No change is needed."]
