# From nothing to a report: `make all`. Every target is a file made from files, so a second run does nothing.

DATA   ?= data/ml-100k
SEED   ?= 0
DEVICE ?= auto
RUN    ?= runs/$(notdir $(DATA))$(if $(filter-out 0,$(SEED)),-seed$(SEED))
PYTHON ?= python3
# More settings of a stage, such as MODEL_FLAGS="--width 128"
EMBED_FLAGS  ?=
SAE_FLAGS    ?=
SASREC_FLAGS ?=
MODEL_FLAGS  ?=
ABLATE_FLAGS ?=

PY     := .venv/bin/python
COMMON  = --seed $(SEED) --device $(DEVICE)
# A dataset of your own may be gzipped; the bundled one is made plain
SOURCE  = $(or $(wildcard $(DATA)/sequences.txt $(DATA)/sequences.txt.gz),$(DATA)/sequences.txt) $(wildcard $(DATA)/texts.jsonl $(DATA)/texts.jsonl.gz)
WEIGHTS = weights/all-MiniLM-L6-v2/config.json

.PHONY: all planted test bench ablate interpret clean help
.DELETE_ON_ERROR:

all: $(RUN)/report.html  ## set up, get data and weights, run every stage, make report.html

planted:  ## the whole run on a generated world whose intents are known, and how well they are recovered
	$(MAKE) runs/planted/interpret.json all DATA=data/planted EMBED_FLAGS="--encoder lsa"

test: .venv/ready $(WEIGHTS)  ## set up and run the tests
	$(PY) -m pytest -q tests

bench: $(RUN)/intents.jsonl  ## measure speed and memory -> benchmarks/results.json; QUICK=1 in under 2 minutes
	$(PY) benchmarks/bench.py --run $(RUN) --device $(DEVICE) $(if $(QUICK),--quick)

ablate: $(RUN)/intents.jsonl  ## train every baseline and ablation -> results/; goes on where it was interrupted
	$(PY) eval.py ablate --run $(RUN) $(COMMON) --out results/ablation_$(notdir $(DATA)).json $(ABLATE_FLAGS)

interpret: $(RUN)/metrics.json  ## measure how well the intents can be understood -> results/
	$(PY) eval.py interpret --run $(RUN) $(COMMON) --out results/interpret_$(notdir $(DATA)).json

clean:  ## remove runs; data, weights and the environment stay
	rm -rf runs

help:  ## list the targets and variables
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10
	@echo "variables: DATA=$(DATA) RUN=$(RUN) SEED=$(SEED) DEVICE=$(DEVICE) EMBED_FLAGS= SAE_FLAGS= MODEL_FLAGS= PYTHON=$(PYTHON)"

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

data/ml-100k/sequences.txt: | .venv/ready
	$(PY) saerec.py prepare ml-100k --out data/ml-100k

data/planted/sequences.txt: | .venv/ready
	$(PY) saerec.py prepare planted --out data/planted

$(WEIGHTS): | .venv/ready
	$(PY) embed.py weights

$(RUN)/embeddings.safetensors: $(SOURCE) embed.py saerec.py | .venv/ready
	$(PY) embed.py --data $(DATA) --run $(RUN) $(COMMON) $(EMBED_FLAGS)

$(RUN)/intents.jsonl: $(RUN)/embeddings.safetensors sae.py saerec.py
	$(PY) sae.py --run $(RUN) $(COMMON) $(SAE_FLAGS)

$(RUN)/sasrec.safetensors: $(RUN)/embeddings.safetensors model.py saerec.py
	$(PY) model.py --run $(RUN) --intents none $(COMMON) $(SASREC_FLAGS)

$(RUN)/model.safetensors: $(RUN)/intents.jsonl model.py saerec.py
	$(PY) model.py --run $(RUN) $(COMMON) $(MODEL_FLAGS)

$(RUN)/metrics.json: $(RUN)/model.safetensors $(RUN)/sasrec.safetensors eval.py
	$(PY) eval.py --run $(RUN) $(COMMON)

$(RUN)/interpret.json: $(RUN)/metrics.json
	$(PY) eval.py interpret --run $(RUN) $(COMMON)

$(RUN)/report.html: $(RUN)/metrics.json docs/report.html eval.py $(wildcard $(RUN)/interpret.json $(RUN)/ablation.json $(RUN)/steering.json)
	$(PY) eval.py report --run $(RUN) $(COMMON)
