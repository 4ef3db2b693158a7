"""The `compute` block: how many workers, and whose."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from batchpipe.specs.spec import Count, Natural, Spec, Text, expect, refuse


def _check_class(path: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*", path):
        raise expect("'module.ClassName'")
    return path


class WorkerRange(Spec):
    """Between how many workers the pool may scale."""

    minimum: Natural = Field(default=0, description="Fewest workers while the run goes on.")
    maximum: Count = Field(description="Most workers.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.minimum > self.maximum:
            raise refuse("minimum", f"is more than the maximum: {self.minimum} > {self.maximum}")
        return self


class ClusterByAddress(Spec):
    """A Dask scheduler that already runs."""

    address: Text = Field(description="Address of a Dask scheduler that runs already, such as tls://host:8786.")


class ClusterByClass(Spec):
    """A Dask cluster class that the run opens and closes."""

    class_: Annotated[Text, AfterValidator(_check_class)] = Field(
        alias="class", description="Dask cluster class to open, such as dask_jobqueue.SLURMCluster."
    )
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the class, passed as they are.")


def _check_workers(workers: Any) -> Any:
    if workers == "auto" or isinstance(workers, Mapping | WorkerRange):
        return workers
    if isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1:
        return workers
    raise expect("auto, a whole number of at least 1, or {minimum, maximum}")


def _check_cluster(cluster: Any) -> Any:
    if cluster == "local" or isinstance(cluster, Mapping | ClusterByAddress | ClusterByClass):
        return cluster
    raise expect("local, {address: ...} or {class: ..., options: {...}}")


def _workers_tag(workers: Any) -> str:
    if isinstance(workers, str):
        return "<auto>"
    return "<number>" if isinstance(workers, int) else "<range>"


def _cluster_tag(cluster: Any) -> str:
    if isinstance(cluster, str):
        return "<local>"
    by_class = isinstance(cluster, ClusterByClass) or (isinstance(cluster, Mapping) and "class" in cluster)
    return "<class>" if by_class else "<address>"


# Picked by what is written, so that a misfit is one error and not one for each member of the union.
# The tags are in <> to tell them from keys in an error's position.
Workers = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")]
    | Annotated[Count, Tag("<number>")]
    | Annotated[WorkerRange, Tag("<range>")],
    Discriminator(_workers_tag),
    BeforeValidator(_check_workers),
]
Cluster = Annotated[
    Annotated[Literal["local"], Tag("<local>")]
    | Annotated[ClusterByAddress, Tag("<address>")]
    | Annotated[ClusterByClass, Tag("<class>")],
    Discriminator(_cluster_tag),
    BeforeValidator(_check_cluster),
]


class ComputeSpec(Spec):
    """How many workers, and whose."""

    workers: Workers = Field(
        default="auto",
        description="Number of workers, `auto`, or `{minimum, maximum}`; auto goes by cores, splits and memory.",
    )
    cluster: Cluster = Field(
        default="local",
        description="`local`, `{address: ...}` of a running scheduler, or `{class: ..., options: {...}}`.",
    )
