"""hard_batches: negmine.mining.build_batches as a batch_sampler for sentence-transformers' training arguments."""

from typing import Any

from negmine.mining import MiningResult, build_batches
from negmine.mining.batches import HardBatches
from negmine.mining.columns import Column
from negmine.ops import checks

OP = "hard_batches"


class QueryBatches:
    """The batches of a dataset whose rows are found by the texts of a result's queries, made by hard_batches.

    The trainer pickles its arguments into each checkpoint. The result, which may be large, is not pickled; copies share it.
    """

    def __init__(self, result: MiningResult, datasets: Any) -> None:
        self._result: MiningResult | None = result
        self._datasets = datasets
        self._number: dict[str, int] = {}  # text -> its first query
        for begin, block in Column(OP, "result", result.query_texts).blocks():
            for at, text in enumerate(block, begin):
                self._number.setdefault(text, at)

    def __getstate__(self) -> dict[str, Any]:
        return {"_result": None}

    def __copy__(self) -> "QueryBatches":
        return self

    def __deepcopy__(self, memo: dict) -> "QueryBatches":
        return self

    def __call__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool = False,
        valid_label_columns: list[str] | None = None,
        generator: Any = None,
        seed: int = 0,
    ) -> HardBatches:
        """The batches of a dataset. sentence-transformers' trainer passes the arguments by these names."""
        if self._result is None:
            raise ValueError(f"{OP}: the result is not part of a checkpoint: call hard_batches(result) again")
        names = getattr(dataset, "column_names", None)
        if not names or not hasattr(dataset, "__len__"):
            raise checks.refuse(
                OP, "dataset", "a datasets.Dataset, which has a length", checks.kind_of(dataset), TypeError
            )
        rows = []
        for row, text in enumerate(dataset[names[0]]):
            if text not in self._number:
                wanted = f"the text of a query of the result in row {row} of its column {names[0]!r}"
                raise checks.refuse(OP, "dataset", wanted, text)
            rows.append(self._number[text])
        options: dict[str, Any] = {"datasets": self._datasets, "drop_last": drop_last, "seed": seed}
        return build_batches(self._result, batch_size, rows=rows, **options)


def hard_batches(result: MiningResult, *, datasets: Any = None) -> QueryBatches:
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
    QueryBatches
        The trainer calls it with a dataset, a batch size, drop_last and a seed. The first column of the dataset must hold the
        texts of the queries, as in `result.to_dataset()`. Two rows of one query, or of queries that share a positive, are never
        in one batch. In a checkpoint of the trainer it is saved without the result.

    Raises
    ------
    TypeError, ValueError
        If the result has no texts. A call of what is returned raises ValueError for a text that is not a query of the result.

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
        raise checks.refuse(OP, "result", "a MiningResult", checks.kind_of(result), TypeError)
    if result.query_texts is None:
        raise checks.refuse(OP, "result", "mined with query_texts, by which the rows of a dataset are found", None)
    return QueryBatches(result, datasets)
