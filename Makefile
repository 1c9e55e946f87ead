# Two commands for a fresh machine with Python 3.11 or later: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# Compiling torch and what stands on it takes longer than importing it, so it is done once.
unexport PYTHONDONTWRITEBYTECODE

# Any embedding model of the Hub, and any data: make quickstart BACKBONE=ORG/NAME DATASET=my/folder
BACKBONE ?= minilm
DATASET ?= python_docs

.PHONY: quickstart demo docs rooms test test-install test-min fuzz lint results results-docs results-sets results-images results-gpu clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python benchmarks/dense2sparse_text.py --quick --backbone $(BACKBONE) --datasets $(DATASET) \
		--output runs/quickstart --name quickstart

demo: $(VENV)/.demo
	$(BIN)/python demo/app.py

# The pages of docs/ and the reference of the package, as build/docs/index.html.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d build/doctrees . build/docs

# Renew the copies of what shipped files share, which every method's folder holds.
rooms:
	for shared in modeling/hub/polyrep_*.py; do \
		for copy in modeling/methods/*/$$(basename $$shared) tests/toy/$$(basename $$shared); do \
			test ! -f $$copy || cp $$shared $$copy; \
		done; \
	done

test: $(VENV)/.dev
	$(PYTEST)

# Whether every dependency has wheels for every Python and machine that README.md names; asks the package index.
test-install: $(VENV)/.dev
	$(BIN)/python -m pytest -n 0 -m install tests/test_install.py

# Damaged and hostile configs, weights and data by the thousand; each is opened or refused in a sentence.
fuzz: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m fuzz --count 20000

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel at the lower bounds that pyproject.toml declares, laid over the packages of the environment.
LOWEST := build/lowest/site-packages

test-min: $(VENV)/.dev
	rm -rf build/lib build/lowest
	$(BIN)/python -m pip install -q --no-compile --no-deps --no-build-isolation --target $(LOWEST) . \
		transformers==5.17.0 sentence-transformers==6.0.1 huggingface-hub==1.33.0
	PYTHONPATH=$(abspath $(LOWEST)) $(BIN)/python -m pip check
	PYTHONPATH=$(abspath $(LOWEST)) $(PYTEST) tests/test_lowest.py tests/test_rooms.py tests/test_room_training.py \
		tests/test_training.py tests/test_hub.py tests/test_lemur.py tests/test_publish.py tests/test_encode.py \
		tests/test_retrievers.py tests/test_bm25.py

# Everything in results/ that a CPU can make again, about thirteen hours on 2 cores. Sets come by name: `polyrep data list`.
results: results-docs results-sets

# Of the documentation on this machine, with the models of the recipes as they are.
results-docs: $(VENV)/.dev
	for run in late-interaction-minilm reinpool-minilm lemur-minilm dense2sparse-minilm gaussian-minilm-frozen \
		multilayer-minilm-frozen; do \
		$(BIN)/accelerate launch train.py hub_configs/$$run --overwrite || exit 1; \
	done
	$(BIN)/python benchmarks/python_docs.py --output results
	$(BIN)/python evaluate.py models/late-interaction-minilm/final --frontier --dataset python_docs \
		--methods mean hierarchical reinpool lemur dense2sparse csr --output results
	$(BIN)/python benchmarks/reinpool_kept.py --output results
	$(BIN)/python benchmarks/serving.py --seconds 40 --output results

# Of the sets that others published: one late-interaction model of four, and heads of tldr_pages.
FOUR := tldr_pages scitldr scifact pubmedqa
TEACHER := cross-encoder/ms-marco-MiniLM-L12-v2
TAUGHT := --objective LateInteractionObjective --hard_negatives 3
results-sets: $(VENV)/.dev
	$(BIN)/accelerate launch train.py hub_configs/late-interaction-minilm --datasets $(FOUR) \
		--output_dir models/four/late-interaction-minilm --overwrite
	$(BIN)/python evaluate.py models/four/late-interaction-minilm/final --dataset $(FOUR) --baselines bm25,minilm \
		--token_pooling mean 1 2 4 8 16 32 --output results --name baselines
	$(BIN)/python benchmarks/bm25.py --output results
	$(BIN)/python benchmarks/cache_memory.py --output results
	$(BIN)/python benchmarks/search_speed.py --output results
	$(BIN)/python benchmarks/dense2sparse_text.py --ablation --flags '--max_steps 60' --output results
	$(BIN)/python benchmarks/dense2sparse_text.py --output results
	$(BIN)/python benchmarks/reinpool_text.py --ablation --flags '--max_steps 100' --output results
	$(BIN)/python benchmarks/reinpool_text.py --output results
	for run in reinpool-minilm lemur-minilm; do \
		$(BIN)/accelerate launch train.py hub_configs/$$run --backbone models/four/late-interaction-minilm/final \
			--datasets tldr_pages --output_dir models/tldr/$$run --overwrite || exit 1; \
	done
	for run in dense2sparse-minilm gaussian-minilm-frozen; do \
		$(BIN)/accelerate launch train.py hub_configs/$$run --datasets tldr_pages --output_dir models/tldr/$$run \
			--overwrite || exit 1; \
	done
	$(BIN)/python benchmarks/reinpool.py --output results
	$(BIN)/python benchmarks/lemur_text.py --ablation --output results
	$(BIN)/python benchmarks/lemur_text.py --output results
	for set in tldr_pages scitldr scifact; do \
		$(BIN)/python evaluate.py models/four/late-interaction-minilm/final --frontier --dataset $$set \
			--output results || exit 1; \
	done
	$(BIN)/python evaluate.py minilm --frontier --dataset tldr_pages --methods unifier dense2sparse csr quantization \
		--fit_seconds 900 --name frontier-minilm-tldr_pages --output results
	$(BIN)/python benchmarks/search.py --output results
	$(BIN)/accelerate launch train.py hub_configs/citadel-minilm --datasets $(FOUR) \
		--output_dir models/four/citadel-minilm --overwrite
	$(BIN)/python benchmarks/routed_growth.py --model models/four/citadel-minilm/final --output results
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/choose.py
	$(BIN)/python benchmarks/encode_speed.py --output results
	$(BIN)/python benchmarks/multilayer_frozen.py --output results
	$(BIN)/python benchmarks/multilayer_depth.py --output results
	$(BIN)/python benchmarks/gaussian.py --output results
	$(BIN)/python benchmarks/gaussian_frozen.py --output results
	$(BIN)/python benchmarks/gaussian_pictures.py --output results
	$(BIN)/python benchmarks/unifier_text.py --dev --output results
	$(BIN)/python benchmarks/unifier_text.py --chosen results/unifier-text-dev.json --output results
	$(BIN)/python benchmarks/metaembed_frozen.py --dev --output results
	$(BIN)/python benchmarks/metaembed_frozen.py --chosen results/metaembed-frozen-dev.json --output results
	$(BIN)/python benchmarks/citadel_text.py --dev --output results
	$(BIN)/python benchmarks/citadel_text.py --chosen results/citadel-frozen-dev.json --output results
	$(BIN)/accelerate launch train.py hub_configs/dense2sparse-minilm --datasets tldr_pages scitldr scifact \
		--output_dir models/hybrids/dense2sparse-minilm --overwrite
	$(BIN)/python benchmarks/hybrids.py --output results
	$(BIN)/python benchmarks/calibration.py --output results
	$(BIN)/accelerate launch train.py hub_configs/late-interaction-minilm --datasets $(FOUR) \
		--backbone answerdotai/answerai-colbert-small-v1 --output_dir models/four/late-answerai-colbert-small-v1 --overwrite
	$(BIN)/python benchmarks/backbones.py --output results --late models/four/late-interaction-minilm/final \
		models/four/late-answerai-colbert-small-v1/final
	$(BIN)/accelerate launch train.py hub_configs/late-interaction-minilm --datasets tldr_pages \
		--output_dir models/taught/labels --overwrite
	$(BIN)/accelerate launch train.py hub_configs/late-interaction-minilm --datasets tldr_pages $(TAUGHT) \
		--output_dir models/taught/negatives --overwrite
	$(BIN)/accelerate launch train.py hub_configs/late-interaction-minilm --datasets tldr_pages $(TAUGHT) \
		--teacher $(TEACHER) --distill_weight 1 --distill scores --output_dir models/taught/teacher --overwrite
	$(BIN)/python benchmarks/teacher.py --teacher $(TEACHER) --output results --late models/taught/labels/final \
		models/taught/negatives/final models/taught/teacher/final
	$(BIN)/python benchmarks/bundle.py --source tldr_pages --output .cache/bundle4
	$(BIN)/python benchmarks/windows.py --late models/four/late-interaction-minilm/final --output results
	for set in tldr_pages scifact; do \
		$(BIN)/accelerate launch train.py hub_configs/gaussian-minilm-frozen --datasets $$set --head_only true \
			--output_dir models/norms/$$set/gaussian-minilm-frozen --overwrite || exit 1; \
		$(BIN)/accelerate launch train.py hub_configs/gaussian-minilm-frozen --datasets $$set --head_only true \
			--equal_norms false --output_dir models/norms/$$set/gaussian-minilm-frozen-plain --overwrite || exit 1; \
		$(BIN)/accelerate launch train.py hub_configs/lemur-minilm --datasets $$set --head_only true \
			--backbone models/four/late-interaction-minilm/final --output_dir models/norms/$$set/lemur-minilm \
			--overwrite || exit 1; \
	done
	$(BIN)/python benchmarks/equal_norms.py --output results

# Images with captions: a folder of image features or images that is yours, see modeling/data/captions.py.
results-images: $(VENV)/.dev
	test -n "$(CAPTIONS)" -a -n "$(VISION)"
	$(BIN)/accelerate launch train.py hub_configs/dual-encoder-mobilenet-minilm \
		--datasets $(CAPTIONS) --vision $(VISION) --overwrite
	$(BIN)/accelerate launch train.py hub_configs/dense2sparse-mobilenet-minilm \
		--datasets $(CAPTIONS) --overwrite
	$(BIN)/python benchmarks/dense2sparse_images.py --dataset $(CAPTIONS) --output results
	$(BIN)/python benchmarks/dense2sparse_search.py --dataset $(CAPTIONS) --output results

# The fine-tuned tiers, for a GPU: each stage again until it says that all models are done.
results-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/multilayer_finetuned.py --stage dev
	$(BIN)/python benchmarks/multilayer_finetuned.py --stage test
	$(BIN)/python benchmarks/multilayer_finetuned.py --stage table --output results
	$(BIN)/python benchmarks/gaussian_finetuned.py --stage dev
	$(BIN)/python benchmarks/gaussian_finetuned.py --stage test
	$(BIN)/python benchmarks/gaussian_finetuned.py --stage table --output results
	$(BIN)/python benchmarks/unifier_finetuned.py --output results
	$(BIN)/python benchmarks/metaembed_text.py --stage dev
	$(BIN)/python benchmarks/metaembed_text.py --stage test
	$(BIN)/python benchmarks/metaembed_text.py --stage table --output results

$(VENV)/.%: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf .cache runs build dist *.egg-info
