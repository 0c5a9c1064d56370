"""Files, mappings or Python rows in; RankingLists out. Never imports torch."""

from fastrank.data.files import DataError
from fastrank.data.formats import (
    read_documents,
    read_lists,
    read_qrels,
    read_queries,
    write_lists,
    write_qrels,
)
from fastrank.data.loading import LoadedData, LoadReport, load_data, load_lists
from fastrank.data.ranking_list import RankingList
from fastrank.data.rows import read_rows, write_rows
from fastrank.data.runs import read_ranked_run, read_run, write_run
from fastrank.data.sources import DataSource

__all__ = [
    "DataError",
    "DataSource",
    "LoadReport",
    "LoadedData",
    "RankingList",
    "load_data",
    "load_lists",
    "read_documents",
    "read_lists",
    "read_qrels",
    "read_queries",
    "read_ranked_run",
    "read_rows",
    "read_run",
    "write_lists",
    "write_qrels",
    "write_rows",
    "write_run",
]
