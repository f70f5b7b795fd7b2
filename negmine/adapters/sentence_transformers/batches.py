"""hard_batches: negmine.mining.build_batches as the batch_sampler of sentence-transformers' training arguments."""

from collections.abc import Callable
from typing import Any

from negmine.mining import MiningResult, build_batches
from negmine.mining.batches import HardBatches
from negmine.mining.columns import Column
from negmine.ops import checks

OP = "hard_batches"


def hard_batches(result: MiningResult, *, datasets: Any = None) -> Callable[..., HardBatches]:
    """Batches of mutually hard anchors without each other's positives, for sentence-transformers' trainer.

        SentenceTransformerTrainingArguments(..., batch_sampler=hard_batches(result))

    result: what mine_hard_negatives or from_texts returned, mined with query_texts.
    datasets: as in build_batches.

    Returns a function that the trainer calls with its dataset, batch size, drop_last and seed. The first column of the dataset
    holds the texts of the queries, as that of result.to_dataset() does; several rows of one query stand in different batches.
    Raises TypeError or ValueError for a result without texts; the function, for a text that is no query of the result.
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
        """The batches of a dataset; the names of the arguments are sentence-transformers'."""
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
