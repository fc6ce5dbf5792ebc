"""What users get wrong, as a table: the command, and what its one sentence must say.

- `Case`, `CASES`: command line, the argument that must be named, the remedy; `alone`: also run as an ordinary process
- `FILES`: small files that the commands read; `test_bad_input` adds checkpoints and a base
"""

import dataclasses
import shlex

FILES = {
    "data.jsonl": '{"prompt": "1 + 1 =", "completion": " 2"}\n' * 3,
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "1\n',
    "columns.jsonl": '{"question": "1 + 1", "answer": "2"}\n',
    "silent.jsonl": '{"prompt": "1 + 1 =", "completion": ""}\n',
    "long.jsonl": '{"prompt": "%s", "completion": " 2"}\n' % ("1 2 " * 3000),
    "recipe.yaml": "base: base\ndataset: data.jsonl\noutput_dir: out\nvariant: full\nmax_steps: 2\n",
    "binary.yaml": "\udcff\udcfe\x00",
    "broken.yaml": "base: [1\nlora_rank: 2\n",
    "null.yaml": "base:\ndataset: data.jsonl\noutput_dir: out\n",
    "mixed.yaml": "base: base\ndataset: data.jsonl\noutput_dir: out\nguidance_classes: 3\n",
    "list.yaml": "- base\n",
    "twice.yaml": "draws: 1\ndraws: 2\n",
    "orphan.yaml": "extends: nowhere.yaml\n",
    "heirless.yaml": "extends: 3\n",
    "circle.yaml": "extends: circle.yaml\n",
    "used/notes.txt": "mine\n",
    "list.json": "[]",
    "flow.json": '{"flow_kwargs": {}}',
    "names.json": '{"flow_kwargs": {"noise_scaling": 64.0}}',
    "kinds.json": '{"flow_kwargs": {"noise_rescaling": []}}',
    "results/results_2026-01-01T00-00-00.json": "{",
    "sweep.yaml": "output: swept\ntasks: [gsm8k]\nmodel_args: {pretrained: l2d}\ngrid: {diffusion_budget: [3, 14]}\n",
    "sweep_key.yaml": "output: swept\ntask: [gsm8k]\nmodel_args: {pretrained: l2d}\n",
    "sweep_run.yaml": "output: swept\ntasks: [gsm8k]\nmodel_args: {pretrained: l2d}\nrun: {fewshots: 3}\n",
    "sweep_out.yaml": "output: data.jsonl/swept\ntasks: [gsm8k]\nmodel_args: {pretrained: l2d}\n",
    "sweep_lost.yaml": "output: swept\ntasks: [gsm8k]\nmodel_args: {pretrained: hollow}\n",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """`words` of `python -m`; the sentence must hold `names` and `remedy`."""

    words: str
    names: str
    remedy: str
    alone: bool = False

    @property
    def argv(self) -> list[str]:
        """The words, split as a shell would."""
        return shlex.split(self.words)


def _train(options: str, names: str, remedy: str, alone: bool = False) -> Case:
    return Case(f"training.train --config recipe.yaml {options}", names, remedy, alone)


def _recipe(file: str, names: str, remedy: str, alone: bool = False) -> Case:
    return Case(f"training.train --config {file}", names, remedy, alone)


def _eval(model_args: str, names: str, remedy: str, alone: bool = False, more: str = "--tasks gsm8k") -> Case:
    return Case(f"lm_eval_ext run --model l2d --model_args {model_args} {more}", names, remedy, alone)


CASES = [
    # recipes that cannot be read
    Case("training.train", "base is not set", "give a hub name or folder", alone=True),
    Case("training.train --base base --output_dir out", "dataset is not set", "--dataset"),
    Case("training.train --base base --dataset data.jsonl", "output_dir is not set", "--output_dir"),
    Case("training.train --config", "--config", "one recipe file"),
    Case("training.train --config=recipe.yaml", "--config=recipe.yaml", "written with a space"),
    Case("training.train --config recipe.yaml --config recipe.yaml", "--config", "once"),
    _recipe("nowhere.yaml", "--config nowhere.yaml", "give the path of a YAML recipe", alone=True),
    _recipe("used", "--config used", "give the path of a YAML recipe"),
    _recipe("binary.yaml", "binary.yaml", "is not valid YAML"),
    _recipe("broken.yaml", "broken.yaml", "expected ',' or ']'", alone=True),
    _recipe("null.yaml", "base is not set", "--base"),
    _recipe("mixed.yaml", "guidance_classes=[3]", "must be a list of type str"),
    _recipe("list.yaml", "list.yaml", "must hold a YAML mapping"),
    _recipe("empty.jsonl", "empty.jsonl", "must hold a YAML mapping"),
    _recipe("twice.yaml", "'draws'", "set twice"),
    _recipe("orphan.yaml", "nowhere.yaml", "give the path of a YAML recipe"),
    _recipe("heirless.yaml", "extends=3", "the name of a recipe file"),
    _recipe("circle.yaml", "extends in", "cannot extend itself"),
    # options
    _train("--learning_rat 1", "'learning_rat'", "did you mean 'learning_rate'", alone=True),
    _train("--lora-rnk 4", "'lora_rnk'", "did you mean 'lora_rank'"),
    _train("--max_queries 64", "'max_queries'", "did you mean 'max_evaluations_per_pass'"),
    _train("--xyzzy 4", "'xyzzy'", "--help"),
    _train("stray", "stray", "usage"),
    _train("--draws many", "--draws", "usage"),
    _train("--draws 0", "draws=0", "at least 1"),
    _train("--learning_rate fast", "--learning_rate", "usage"),
    _train("--learning_rate -1", "learning_rate=-1.0", "at least 0"),
    _train("--per_device_train_batch_size 0", "per_device_train_batch_size=0", "at least 1"),
    _train("--gradient_accumulation_steps 0", "gradient_accumulation_steps=0", "at least 1"),
    _train("--max_steps -1 --num_train_epochs -1", "num_train_epochs=-1", "above 0"),
    _train("--adam_beta1 2", "adam_beta1=2.0", "below 1"),
    _train("--weight_decay -1", "weight_decay=-1.0", "at least 0"),
    _train("--seed -1", "seed=-1", "a whole number from 0"),
    _train("--max_steps 0", "max_steps=0", "set it above 0"),
    _train("--dataloader_num_workers -1", "dataloader_num_workers=-1", "at least 0"),
    _train("--dataset_config foo", "dataset_config", "leave it out"),
    _train("--train_split trian", "split 'trian'", "['train']"),
    _train("--report_to wendy", "report_to='wendy'", "choose one of none"),
    _train("--lr_scheduler_type cosin", "lr_scheduler_type", "choose from"),
    _train("--method dpo", "method='dpo'", "choose one of l2d, lora_sft, full_sft"),
    _train("--dtype float31", "dtype='float31'", "choose one of auto"),
    _train("--too_long ignore", "too_long='ignore'", "choose one of error, drop, truncate"),
    _train("--sampler '{budget: 4}'", "sampler=", "JSON on the command line"),
    _train("""--sampler '{"budget": 4}'""", "diffusion_budget=4", "use 3 or 5"),
    # contradictions
    _train("--bf16 true --fp16 true", "bf16=True and fp16=True", "keep one"),
    _train("--lora_rank 4", "lora_rank", "leave out"),
    _train("--eval_steps 1 --eval_strategy steps", "eval_strategy", "set eval_split or eval_holdout"),
    _train("--eval_holdout 2 --eval_split test", "eval_holdout", "keep one"),
    _train("--packing true", "packing=True", "set it"),
    _train("--resume_from_checkpoint auto --overwrite_output_dir true", "overwrite_output_dir", "keep one"),
    _train("--guidance_class math", "guidance_class", "list the names"),
    # base, data and folders
    _train("--base ./nowhere", "base='./nowhere'", "give the folder or the hub name"),
    _train("--base no/such-model", "base='no/such-model'", "neither a model's folder nor"),
    _train("--base l2d", "base=", "name the model that it was trained on"),
    _train("--push_to_hub true", "push_to_hub=True", "unset one of them"),
    _train("--max_length 5000", "max_length=5000", "use at most 4096"),
    _train("--dataset nowhere.jsonl", "dataset='nowhere.jsonl'", "give a file, a folder or a hub name"),
    _train("--dataset empty.jsonl", "dataset='empty.jsonl'", "nothing to train on"),
    _train("--dataset broken.jsonl", "broken.jsonl, example 1", "check its format"),
    _train("--dry_run_json out.json", "dry_run_json", "set dry_run: true"),
    _train("--dry_run true --dry_run_json absent/out.json", "dry_run_json='absent/out.json'", "name another file"),
    _train("--dry_run true --dry_run_examples -1", "dry_run_examples=-1", "at least 0"),
    _train("--streaming true --max_steps -1", "streaming=True", "set max_steps"),
    _train("--streaming true --eval_holdout 1", "eval_holdout", "name eval_dataset"),
    _train("""--dataset '[{"dataset": "data.jsonl", "weight": -1}]'""", "entry 1: weight=-1", "above 0"),
    _train("""--dataset '[{"dataset": "gone.csv"}]'""", "dataset='gone.csv'", "give a file"),
    _train("--dataset columns.jsonl", "columns question, answer", "set columns", alone=True),
    _train("--dataset silent.jsonl", "no train example", "check that completions"),
    _train("--dataset long.jsonl", "max_length=4096", "set too_long"),
    _train("--dataset data.jsonl --eval_dataset gone.json", "eval_dataset='gone.json'", "give a file"),
    _train("--output_dir used", "output_dir='used'", "overwrite_output_dir: true", alone=True),
    _train("--output_dir base", "output_dir='base'", "choose another folder"),
    _train("--output_dir data.jsonl", "output_dir='data.jsonl'", "give a folder"),
    _train("--output_dir data.jsonl/out", "output_dir='data.jsonl/out'", "give a folder"),
    _train("--resume_from_checkpoint nowhere", "resume_from_checkpoint='nowhere'", "name a checkpoint, true or auto"),
    _train("--resume_from_checkpoint true", "resume_from_checkpoint=True", "needs a complete checkpoint"),
    # lm_eval --model l2d
    _eval("seed=1", "'pretrained' is missing", "give --model_args pretrained=FOLDER", alone=True),
    _eval("pretrained=l2d", "--apply_chat_template", "the protocol has no other form", more="--tasks l2d_released"),
    _eval(
        "pretrained=l2d",
        "l2d_released_humaneval",
        "confirm with --confirm_run_unsafe_code",
        more="--tasks l2d_released --apply_chat_template",
    ),
    _eval(
        "pretrained=l2d",
        "'openai/gsm8k' cannot be read",
        "connect to a hub",
        alone=True,
        more="--tasks l2d_released_gsm8k --apply_chat_template",
    ),
    _eval("pretrained=nowhere", "pretrained='nowhere'", "give the folder of an L2D checkpoint", alone=True),
    _eval("pretrained=used", "pretrained='used'", "give the folder of an L2D checkpoint"),
    _eval("pretrained=base", "pretrained='base'", "evaluate it with --model hf"),
    _eval("pretrained=hollow", "pretrained='hollow'", "copy or train it again"),
    _eval("pretrained=lost", "base='/nowhere/gone'", "pass base=FOLDER"),
    _eval("pretrained=l2d,base=./nowhere", "base='./nowhere'", "give the folder or the hub name"),
    _eval("pretrained=l2d,diffusion_budgett=15", "'diffusion_budgett'", "did you mean 'diffusion_budget'", alone=True),
    _eval("pretrained=l2d,diffusion_budget=14", "diffusion_budget=14", "use 13 or 15", alone=True),
    _eval("pretrained=l2d,diffusion_budget=many", "diffusion_budget='many'", "a whole number"),
    _eval("pretrained=l2d,solver=midpiont", "solver='midpiont'", "choose one of: euler, midpoint"),
    _eval("pretrained=l2d,guidance_scale=1.5", "guidance_scale=1.5", "leave guidance_scale at 1.0"),
    _eval("pretrained=guided,guidance_scale=1.5", "guidance_scale=1.5", "one of: math, coding"),
    _eval("pretrained=guided,guidance_class=history", "guidance_class='history'", "choose one of: math, coding"),
    _eval("pretrained=l2d,dtype=float31", "dtype='float31'", "must be auto, float32"),
    _eval("pretrained=l2d,device=gpu", "device='gpu'", "must be cpu, cuda"),
    _eval("pretrained=l2d,batch_size=0", "batch_size=0", "at least 1"),
    _eval("pretrained=l2d,token_search=best", "token_search='best'", "best_of_N or beam_N"),
    _eval("""'{"pretrained": 3}'""", "pretrained=3", "must be the folder"),
    _eval("""'{"pretrained": "l2d"'""", '{"pretrained"', "Use double quotes for JSON"),
    _eval("pretrained=l2d", "token_search='best'", "best_of_N", more="--tasks x --gen_kwargs token_search=best"),
    _eval("pretrained=l2d", "tasks is not set", "give --tasks", more=""),
    _eval("pretrained=l2d", "--output_path", "Specify --output_path", more="--tasks gsm8k --log_samples"),
    _eval("pretrained=l2d", "nowhere.yaml", "see lm_eval run --help", more="--config nowhere.yaml"),
    _eval("pretrained=l2d", "'budget'", "did you mean 'diffusion_budget'", more="--tasks x --gen_kwargs budget=3"),
    _eval("pretrained=l2d", "diffusion_budget=4", "use 3 or 5", more="--tasks x --gen_kwargs diffusion_budget=4"),
    _eval("pretrained=l2d", "num_beams=2", "leave num_beams at 1", more="--tasks x --gen_kwargs num_beams=2"),
    _eval("pretrained=l2d", "'num_return_sequences'", "repeats", more="--tasks x --gen_kwargs num_return_sequences=2"),
    # leaderboard
    Case("lm_eval_ext.leaderboard", "RESULTS_DIR", "--help", alone=True),
    Case("lm_eval_ext.leaderboard nowhere", "'nowhere'", "give folders with", alone=True),
    Case("lm_eval_ext.leaderboard used", "used", "give folders that lm_eval wrote"),
    Case("lm_eval_ext.leaderboard results", "truncated or damaged", "give folders that lm_eval wrote"),
    Case("lm_eval_ext.leaderboard results --only pdf", "--only", "'html', 'md', 'csv', 'json'"),
    Case("lm_eval_ext.leaderboard results --metric gsm8k", "--metric", "must look like gsm8k="),
    Case("lm_eval_ext.leaderboard results --margin 0", "margin=0", "must be positive"),
    Case("lm_eval_ext.leaderboard results --outt x", "--outt", "did you mean --out?"),
    Case("lm_eval_ext.leaderboard results --out data.jsonl", "out='data.jsonl'", "give a folder"),
    Case("lm_eval_ext.leaderboard results --out data.jsonl/x", "out='data.jsonl/x'", "give a folder"),
    # sweep
    Case("lm_eval_ext.sweep", "file", "--help", alone=True),
    Case("lm_eval_ext.sweep nowhere.yaml", "sweep file 'nowhere.yaml'", "No such file", alone=True),
    Case("lm_eval_ext.sweep binary.yaml", "sweep file 'binary.yaml'", "cannot be read"),
    Case("lm_eval_ext.sweep broken.yaml", "sweep file 'broken.yaml'", "expected ',' or ']'"),
    Case("lm_eval_ext.sweep list.yaml", "sweep file 'list.yaml'", "must hold a mapping"),
    Case("lm_eval_ext.sweep sweep.yaml", "diffusion_budget=14", "use 13 or 15", alone=True),
    Case("lm_eval_ext.sweep sweep_key.yaml", "'task'", "use output, tasks"),
    Case("lm_eval_ext.sweep sweep_run.yaml", "run:", "unrecognized arguments: --fewshots"),
    Case("lm_eval_ext.sweep sweep_out.yaml", "output='data.jsonl/swept'", "give a folder"),
    Case("lm_eval_ext.sweep sweep_lost.yaml", "pretrained='hollow'", "copy or train it again"),
    # the demo, and conversion of released checkpoints
    Case("training.demo --outt x", "--outt", "did you mean --out?"),
    Case("training.demo --out data.jsonl", "data.jsonl is a file", "choose a folder"),
    Case("l2d.released base", "target", "--help"),
    Case("l2d.released base used --settings recipe.yaml", "target='used'", "name a new folder"),
    Case("l2d.released base new --settings gone.json", "settings='gone.json'", "give a JSON file"),
    Case("l2d.released base new --settings list.json", "settings='list.json'", "a mapping with flow_kwargs"),
    Case("l2d.released base new --settings kinds.json --base base", "settings='kinds.json'", "flow_kwargs"),
    Case("l2d.released base new --settings names.json --base base", "'noise_scaling'", "correct the name"),
    Case(
        "l2d.released base new --settings flow.json --base l2d", "base='l2d'", "name the model that it was trained on"
    ),
    # trace and chat
    Case("l2d", "trace | chat | serve | card", "--help"),
    Case("l2d serve", "DIR", "--help"),
    Case("l2d serve l2d --budget 14", "diffusion_budget=14", "use 13 or 15"),
    Case("l2d serve nowhere", "pretrained='nowhere'", "give the folder"),
    Case("l2d serve l2d --port 99999", "port=99999", "choose another", alone=True),
    Case("l2d serve l2d --port many", "--port", "--help"),
    Case("l2d card nowhere", "pretrained='nowhere'", "give the folder of an L2D checkpoint"),
    Case("l2d card base", "pretrained='base'", "give the folder or hub name"),
    Case("l2d card l2d gone", "results 'gone'", "give files or folders that lm_eval wrote", alone=True),
    Case("l2d card l2d used", "results", "give what lm_eval --model l2d wrote"),
    Case("l2d card l2d results", "results_2026", "cannot be read"),
    Case("l2d card l2d --push someone/model", "--push someone/model", "HF_HUB_OFFLINE"),
    Case("l2d trac l2d", "'trac'", "'trace', 'chat', 'serve', 'card'"),
    Case("l2d trace l2d", "--prompt", "--help", alone=True),
    Case("l2d trace l2d --prompt x --budgett 3", "--budgett", "did you mean --budget?"),
    Case("l2d trace l2d --prompt x --budget many", "diffusion_budget='many'", "a whole number of at least 1"),
    Case("l2d trace l2d --prompt x --budget 14", "diffusion_budget=14", "use 13 or 15", alone=True),
    Case("l2d trace l2d --prompt x --solver bosh3 --budget 3", "solver='bosh3'", "trace a fixed-grid solver"),
    Case("l2d trace l2d --prompt x --votes 2", "votes was removed", "leave it out"),
    Case("l2d trace nowhere --prompt x", "pretrained='nowhere'", "give the folder"),
    Case("l2d trace base --prompt x", "pretrained='base'", "give the folder"),
    Case("l2d trace l2d --prompt x --out data.jsonl/trace.html", "out='data.jsonl'", "give a folder"),
    Case("l2d trace l2d --prompt x --temperature nan", "temperature=nan", "at least 0"),
    Case("l2d trace l2d --prompt x --max-new-tokens 5000", "max_new_tokens=5000", "below the base's 4096", alone=True),
    Case("l2d trace l2d --prompt \udcff", "prompt holds bytes", "write it in UTF-8"),
    Case("l2d trace mute --prompt x --chat", "no chat template", "without --chat"),
    Case("l2d chat hollow", "pretrained='hollow'", "copy or train it again"),
    Case("l2d chat lost", "base='/nowhere/gone'", "pass base=FOLDER"),
    Case("l2d chat l2d --system \udcff", "system holds bytes", "write it in UTF-8"),
    Case("l2d chat mute", "no chat template", "use --plain"),
    Case("l2d chat l2d --guidance 2", "guidance_scale=2", "leave guidance_scale at 1.0"),
    Case("l2d chat guided --guidance 2 --guidance-class history", "guidance_class='history'", "one of: math, coding"),
    Case("l2d chat l2d --temperature -1", "temperature=-1", "at least 0", alone=True),
    Case("l2d chat l2d --seed -1", "seed=-1", "a whole number from 0"),
    Case("l2d chat l2d --solver midpiont", "--solver", "choose one of: euler, midpoint"),
    Case("l2d trace l2d --prompt x --final-time 2", "final_time=2", "a number from 0 to 1"),
    Case("l2d trace l2d --prompt x --speculation off", "speculation='off'", "true or false"),
    Case("l2d chat l2d --max-new-tokens 0", "max_new_tokens=0", "at least 1"),
    Case("l2d chat l2d --dtype float31", "--dtype", "'float32', 'bfloat16', 'float16'"),
    Case("l2d chat l2d --device gpu", "device='gpu'", "use cpu"),
]
