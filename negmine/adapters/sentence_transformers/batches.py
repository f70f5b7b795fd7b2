"""hard_batches: negmine.mining.build_batches as a batch_sampler for sentence-transformers' training arguments."""

from collections.abc import Callable
from typing import Any

from negmine.mining import MiningResult, build_batches
from negmine.mining.batches import HardBatches
from negmine.mining.columns import Column
from negmine.ops import checks

OP = "hard_batches"


def hard_batches(result: MiningResult, *, datasets: Any = None) -> Callable[..., HardBatches]:
    """A batch sampler for sentence-transformers' trainer whose batches hold queries that are hard for each other.

    Pass it as SentenceTransformerTrainingArguments(..., batch_sampler=hard_batches(result)).

    Parameters
    ----------
    result : MiningResult
        The result of `mine_hard_negatives` or `from_texts`, mined with query_texts.
    datasets : optional
        As in `build_batches`.

    Returns
    -------
    callable
        A function that the trainer calls with a dataset, a batch size, drop_last and a seed. The first column of the dataset must
        hold the texts of the queries, as in `result.to_dataset()`. Two rows of one query, or of queries that share a positive,
        are never in one batch.

    Raises
    ------
    TypeError, ValueError
        If the result has no texts. The returned function raises ValueError for a text that is not a query of the result.

    Examples
    --------
    >>> from negmine.adapters.sentence_transformers import hard_batches
    >>> rows, texts = torch.randn(50, 16), [f"question {i}" for i in range(8)]
    >>> result = negmine.mine_hard_negatives(rows[:8], rows, list(range(8)), num_negatives=2, query_texts=texts)
    >>> sampler = hard_batches(result)  # for the trainer, which calls it with its dataset, here of one column
    >>> class Dataset(dict):
    ...     column_names = ["anchor"]
    >>> sampler(Dataset(anchor=texts), 4).batch_size
    4
    """
    if not isinstance(result, MiningResult):
        raise checks.refuse(OP, "result", "a MiningResult", type(result).__name__, TypeError)
    if result.query_texts is None:
        raise checks.refuse(OP, "result", "mined with query_texts, which the rows of a dataset are found by", None)
    number: dict[str, int] = {}
    for begin, block in Column(OP, "result", result.query_texts).blocks():
        for at, text in enumerate(block, begin):
            number.setdefault(text, at)

    def sampler(
        dataset: Any,
        batch_size: int,
        drop_last: bool = False,
        valid_label_columns: list[str] | None = None,
        generator: Any = None,
        seed: int = 0,
    ) -> HardBatches:
        """The batches of a dataset. sentence-transformers' trainer passes the arguments by these names."""
        names = getattr(dataset, "column_names", None)
        if not names or not hasattr(dataset, "__len__"):
            raise checks.refuse(
                OP, "dataset", "a datasets.Dataset, which has a length", type(dataset).__name__, TypeError
            )
        rows = []
        for row, text in enumerate(dataset[names[0]]):
            if text not in number:
                wanted = f"the text of a query of the result in row {row} of its column {names[0]!r}"
                raise checks.refuse(OP, "dataset", wanted, text)
            rows.append(number[text])
        return build_batches(result, batch_size, rows=rows, datasets=datasets, drop_last=drop_last, seed=seed)

    return sampler
