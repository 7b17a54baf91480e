"""The command lines that ``--help`` shows."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "relfv": (
        "relfv doctor --model demo",
        "relfv run --model demo --q_list Q1,Q14",
        "relfv status",
    ),
    "run": (
        "relfv run --model meta-llama/Llama-3.1-8B --relation_csv_path my_relations.csv",
        "relfv run --model demo --q_list Q1,Q14 --dry_run",
        "relfv run --model meta-llama/Llama-3.1-8B --devices all",
        "relfv run --model demo --alpha 2 --out_root alpha_2 --reuse_stepd results_fv/relation_qwise",
        "relfv run --config results_fv/relation_qwise/relationA_ex/run_manifest.json --out_root repeated",
    ),
    "doctor": (
        "relfv doctor --model meta-llama/Llama-3.1-8B --relation_csv_path my_relations.csv",
        "relfv doctor --model demo --q_list Q1 --json",
    ),
    "cross": ("relfv cross", "relfv cross results_fv/relation_qwise/my_relations --q_list Q1,Q2,Q3"),
    "aggregate": (
        "relfv aggregate",
        "relfv aggregate results_fv/relation_qwise --all",
        "relfv aggregate results_fv/relation_qwise/my_relations --no_model",
    ),
    "compare": (
        "relfv compare results_a results_b --out_dir comparison",
        "relfv compare alpha_1/my_relations alpha_2/my_relations",
    ),
    "status": ("relfv status", "relfv status --out_root results_fv/relation_qwise --json"),
    "verify": ("relfv verify", "relfv verify results_fv/relation_qwise/relationA_ex/Q1"),
    "figure": (
        "relfv figure results_fv/relation_qwise/relationA_ex --out heatmaps.pdf",
        "relfv figure results_fv/relation_qwise/relationA_ex --kind curve --q_list Q1,Q15 --out curves.svg",
    ),
    "export": ("relfv export results_fv/relation_qwise/relationA_ex --parquet",),
    "report": ("relfv report", "relfv report results_fv/relation_qwise/relationA_ex"),
    "import": (
        "relfv import function_vectors/dataset_files --out todd.csv",
        "relfv import my_words.csv --out cleaned.csv --alternatives /",
    ),
    "stepd": (
        "relfv stepd --model demo --relation_q_list Q1 --out_base_dir results_fv/relation_qwise/relationA_ex/Q1",
    ),
    "heatmap": (
        "relfv heatmap --in_dir results_fv/relation_qwise/relationA_ex/Q1/artifacts --metric mean_delta_logit",
    ),
    "completion": (
        "relfv completion bash > ~/.local/share/bash-completion/completions/relfv",
        "relfv completion zsh > ~/.zfunc/_relfv",
        "relfv completion fish > ~/.config/fish/completions/relfv.fish",
    ),
    "demo-model": ("relfv demo-model train --out_dir my_demo_model",),
}
