"""Results on a card: the same numbers in the table and in the model index that the Hub reads."""

import math
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_diffusion.cards.tables import cell


INDEX = "model-index"
NO_TASK = "other"


def eval_results(
    metrics: dict[str, Any] | None, task: str | None, data_name: str, dataset: str | None = None
) -> list[EvalResult]:
    """Results of `metrics`: name -> number, or -> {"value": number, "protocol": text, ...}.

    task: the Hub's task. data_name: of the data that they were measured on. dataset: its id, where
        the Hub has it.
    """
    results = []
    for name, given in (metrics or {}).items():
        given = dict(given) if isinstance(given, dict) else {"value": given}
        value = float(given.pop("value"))
        # The protocol stands first among the details, and is left out where there is none.
        details = {
            key: detail for key, detail in {"protocol": given.pop("protocol", ""), **given}.items() if detail != ""
        }
        results.append(
            EvalResult(
                task_type=task or NO_TASK,
                dataset_type=dataset or "custom",
                dataset_name=data_name,
                metric_type=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
                metric_name=name,
                metric_value=value,
                metric_args=details or None,
            )
        )
    return results


def model_index(title: str, results: Sequence[EvalResult]) -> dict[str, Any]:
    """The metadata of finite results: NaN is no JSON, and the Hub would refuse the whole card."""
    finite = [result for result in results if math.isfinite(result.metric_value)]
    return {INDEX: eval_results_to_model_index(title, finite)} if finite else {}


def recorded_results(metadata: dict[str, Any]) -> list[EvalResult]:
    """The results in the metadata of a card."""
    return model_index_to_eval_results(metadata[INDEX])[1] if metadata.get(INDEX) else []


def result_rows(results: Sequence[EvalResult]) -> list[str]:
    """Lines of the table of results; a protocol that is that of the line before is not repeated."""
    protocols = [(result.metric_args or {}).get("protocol", "") for result in results]
    return [
        f"| {cell(result.metric_name)} | {result.metric_value:.6g} | "
        f"{'as above' if protocol and protocol == before else cell(protocol)} |"
        for result, protocol, before in zip(results, protocols, ["", *protocols])
    ]
