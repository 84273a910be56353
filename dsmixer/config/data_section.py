"""The section ``data`` of a recipe: domains, where their records are, and how these become texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from dsmixer.config.benchmarks import BenchmarkName, filled
from dsmixer.config.stages import Count, Name, Section, Text

RecordForm = Literal["auto", "prompt_completion", "messages", "alpaca", "sharegpt", "multiple_choice"]
FORM_HELP = "form of a record; auto: told from its keys"


class RecordTemplate(Section):
    """How the columns of a data set become texts, in Jinja: ``Question: {{ question }}``."""

    prompt: Text = Field(description="text that the model is given, over a record's columns")
    completion: Text | None = Field(
        default=None, description="text that it shall write; null: the right one of choices"
    )
    choices: Text | Annotated[tuple[Text, ...], Strict(False)] | None = Field(
        default=None,
        description="candidate completions: a list of texts, or an expression that gives one, such as "
        "choices.text; null: none",
    )
    answer: Text | None = Field(
        default=None,
        description="which choice is right: its position from 0, letter or text; null: no choices",
    )
    separator: str = Field(
        default=" ", description="what stands before the completion and before each choice"
    )


class DomainConfig(Section):
    """One domain: its data, and the expert that serves it."""

    name: Name = Field(description="name of the domain, and of its expert unless expert says otherwise")
    train: Text = Field(description="train data: a file (.jsonl .json .csv .tsv .parquet) or a hub id")
    test: Text | None = Field(default=None, description="held-out data: a file or a hub id; null: none")
    weight: float = Field(
        default=1.0, gt=0, description="times each train example is seen an epoch, on average"
    )
    max_train: Count | None = Field(
        default=None, description="most train examples, drawn with the seed; null: all"
    )
    max_test: Count | None = Field(
        default=None, description="most test examples, drawn with the seed; null: all"
    )
    split_train: Text = Field(default="train", description="split read for train, of a hub data set")
    split_test: Text = Field(default="test", description="split read for test, of a hub data set")
    subset: Text | None = Field(
        default=None, description="configuration of a hub data set; null: its default"
    )
    subset_test: Text | None = Field(
        default=None, description="the same for test, where that is another data set; null: as subset"
    )
    form: RecordForm = Field(default="auto", description=FORM_HELP)
    template: RecordTemplate | None = Field(
        default=None, description="texts made of the records' columns; null: the records have a known form"
    )
    template_test: RecordTemplate | None = Field(
        default=None, description="the same for test, where its columns are others; null: as template"
    )
    benchmark: BenchmarkName | None = Field(
        default=None,
        description="a public benchmark, such as gsm8k, that gives the keys of the entry that are not "
        "written; null: none",
    )
    expert: Name | None = Field(
        default=None, description="expert that serves the domain; null: the one of its name"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_benchmark(cls, values: Any) -> Any:
        return filled(values) if isinstance(values, dict) else values


class SourceConfig(Section):
    """One data set in which a column names the domain of each record."""

    train: Text = Field(description="train data of all domains: a file or a hub id")
    test: Text | None = Field(
        default=None, description="held-out data of all domains: a file or a hub id; null: none"
    )
    column: Text = Field(description="column whose value names the domain of a record")
    weight: float = Field(
        default=1.0, gt=0, description="times each train example is seen an epoch, on average"
    )
    max_train: Count | None = Field(
        default=None, description="most train examples a domain, drawn with the seed; null: all"
    )
    max_test: Count | None = Field(
        default=None, description="most test examples a domain, drawn with the seed; null: all"
    )
    split_train: Text = Field(default="train", description="split read for train, of a hub data set")
    split_test: Text = Field(default="test", description="split read for test, of a hub data set")
    subset: Text | None = Field(
        default=None, description="configuration of a hub data set; null: its default"
    )
    form: RecordForm = Field(default="auto", description=FORM_HELP)


class DataConfig(Section):
    """What is trained and tested on, and how records become rows."""

    max_length: int = Field(
        default=1024, ge=8, description="longest row, in tokens; with an encoder, each side of it"
    )
    packing: bool = Field(
        default=True, description="whether several examples share a row, without seeing each other"
    )
    loss: Literal["completion", "all"] = Field(default="completion", description="tokens that carry loss")
    on_bad_record: Literal["error", "skip"] = Field(
        default="error",
        description="error: stop at a bad record; skip: count it and write it to a quarantine file",
    )
    cache_dir: Text | None = Field(
        default=None, description="folder of the cache of tokenised data; null: kept in memory, once a node"
    )
    domains: Annotated[tuple[DomainConfig, ...], Strict(False)] = Field(
        default=(), description="the domains, one entry each"
    )
    source: SourceConfig | None = Field(
        default=None, description="one data set whose column names the domains; null: none"
    )
