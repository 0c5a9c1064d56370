"""The first stage's lists: queries that are no fold's, documents in the order of the base weights' bi-encoder.

python benchmarks/distillation_lists.py stage1.jsonl: reads FASTRANK_DATA. 1,700 queries made from sentences of MS
MARCO's passages, 500 questions of MedQuAD, 250 claims of SciFact and the 76 queries of TREC DL 2022, each with BM25's
first 4 documents and a sample of the next 56; the label of a document is 20 times its cosine with the query.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from pathlib import Path

from workloads import data_folder

from fastrank.bi_encoder import bi_encoder_scores
from fastrank.data import RankingList, read_documents, read_queries, write_lists
from fastrank.data.bm25 import bm25_run
from fastrank.train.demo import base_weights

STOP_WORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in into is "
    "it its may more most not of on or our she so some such than that the their them then there these they this "
    "those to was we were what when where which while who will with would you your also all any about after other "
    "one only very many each".split()
)
DEPTH, NUM_FIRST, NUM_OTHERS, NUM_OTHERS_DL22 = 60, 4, 12, 28
LABEL_SCALE = 20


def query_from(passage: str, rng: random.Random) -> str | None:
    """Three to six content words of one of its sentences, some with a question word in front; None: it has too few."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", passage) if 5 <= len(part.split()) <= 40]
    if not sentences:
        return None
    words = [word.lower() for word in re.findall(r"[A-Za-z0-9'-]+", rng.choice(sentences))]
    content = [word for word in words if word not in STOP_WORDS and len(word) > 1]
    if len(content) < 3:
        return None
    count = rng.randint(3, 6)
    start = rng.randint(0, max(0, len(content) - count))
    return rng.choice(["", "", "what is ", "how ", "why "]) + " ".join(content[start : start + count])


def make_lists(folder: Path) -> list[RankingList]:
    """The lists without labels, in random order."""
    rng = random.Random(1)
    dl = folder / "trec-dl"
    second = read_documents(dl / "passages.msmarco-v2.dl21-dl22.jsonl.gz")
    passages = read_documents(dl / "passages.msmarco-v1.dl19-dl20.jsonl.gz") | second
    jobs: dict[str, list[tuple[str, str | None]]] = {"ms": []}  # by corpus: query, the document that it was made from
    names = sorted(passages)
    while len(jobs["ms"]) < 1700:
        name = rng.choice(names)
        if query := query_from(passages[name], rng):
            jobs["ms"].append((query, name))
    with gzip.open(folder / "medquad" / "qa_pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    rng.shuffle(answers)
    jobs["med"] = [(row["question"], row["id"]) for row in answers[:500]]
    claims = list(read_queries(folder / "scifact" / "queries.train.tsv").values())
    rng.shuffle(claims)
    jobs["sf"] = [(claim, None) for claim in claims[:250]]
    jobs["ms22"] = [(query, None) for query in read_queries(dl / "queries.dl22.tsv").values()]
    with gzip.open(folder / "scifact" / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        abstracts = {str(row["_id"]): f"{row.get('title', '')}. {row['text']}"[:700] for row in map(json.loads, file)}
    corpora = {
        "ms": passages,
        "med": {row["id"]: row["answer"][:600] for row in answers[:9000]},
        "sf": abstracts,
        "ms22": second,
    }
    lists = []
    for corpus, documents in corpora.items():
        run = bm25_run({str(i): query for i, (query, _) in enumerate(jobs[corpus])}, documents, DEPTH)
        for number, (query, source) in enumerate(jobs[corpus]):
            found = list(run[str(number)])
            if len(found) < 10:
                continue
            others = NUM_OTHERS_DL22 if corpus == "ms22" else NUM_OTHERS
            ids = found[:NUM_FIRST] + rng.sample(found[NUM_FIRST:], min(len(found) - NUM_FIRST, others))
            if source and source not in ids:
                ids[-1] = source
            lists.append(RankingList(query, [documents[name] for name in ids], None, f"{corpus}-{number}", ids))
    rng.shuffle(lists)
    return lists


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    options = parser.parse_args()
    folder = data_folder()
    if folder is None:
        parser.error("set FASTRANK_DATA to the folder that holds the data")
    lists = make_lists(folder)
    scores = bi_encoder_scores(base_weights(), lists)
    labels = [[round(float(one) * LABEL_SCALE, 4) for one in of_list] for of_list in scores]
    write_lists(
        options.output,
        (
            RankingList(one.query, one.documents, values, one.query_id, one.document_ids)
            for one, values in zip(lists, labels, strict=True)
        ),
    )


if __name__ == "__main__":
    main()
