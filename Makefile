# From nothing to a report: `make all`. Every target is a file made from files; a second run does nothing.

DATA   ?= data/ml-100k
SEED   ?= 0
DEVICE ?= auto
override DATA := $(patsubst %/,%,$(DATA))
# Results lie in a run folder named after the last part of DATA
RUN    ?= runs/$(notdir $(DATA))$(if $(filter-out 0,$(SEED)),-seed$(SEED))
PYTHON ?= python3
# What embeds the texts; sources/lsa.py needs no weights, sources/bert.py takes those of another BERT
EMBED  ?= embed.py
# More settings of a stage, such as MODEL_FLAGS="--width 128" for all three models
EMBED_FLAGS    ?=
SAE_FLAGS      ?=
MODEL_FLAGS    ?=
SASREC_FLAGS   ?=
SAEREC_FLAGS   ?=
GROUNDED_FLAGS ?=
# Stages at a time (set this, not -j): two trainings side by side take far less time than one after
# the other with twice the threads
JOBS ?= 2

# What make or the shell would read as something else in a path
ODD := [ ] & ; ' " : % * ? ( ) < > | \ ` $$ \#
REFUSED := $(filter-out 2,$(words $(DATA) $(RUN))) $(foreach c,$(ODD),$(findstring $c,$(DATA)$(RUN))) $(filter %/,$(DATA))
$(if $(strip $(REFUSED)),$(error make takes no spaces, no // and none of $(ODD) in paths, DATA is "$(DATA)", RUN is \
  "$(RUN)": rename the folder, link to it by another name (ln -s), or call the scripts yourself))
$(if $(filter 1 2 3,$(JOBS)),,$(error JOBS is "$(JOBS)": make it 1, 2 or 3, for no more stages can run side by side))

PY      := .venv/bin/python
COMMON   = --run $(RUN) --seed $(SEED) --device $(DEVICE)
# Nothing is random in an encoder
EMBEDDED = --data $(DATA) --run $(RUN) $(if $(filter-out embed.py sources/bert.py,$(EMBED)),--seed $(SEED)) --device $(DEVICE) $(EMBED_FLAGS)
WEIGHTS  = weights/all-MiniLM-L6-v2/config.json
# A dataset of your own may be gzipped; the bundled one is made plain
SOURCE   = $(or $(wildcard $(DATA)/sequences.txt $(DATA)/sequences.txt.gz),$(DATA)/sequences.txt) \
           $(wildcard $(DATA)/texts.jsonl $(DATA)/texts.jsonl.gz)

# The files that EMBED_FLAGS name, after = or a space: embeddings made elsewhere, or an encoder's folder
NAMED    = $(subst =, ,$(EMBED_FLAGS))
FILES    = $(wildcard $(NAMED) $(foreach in,* */*.json */*.safetensors */*.txt,$(addsuffix /$(in),$(NAMED))))

# What the result of a stage depends on besides its scripts and the stage before: the words of its command and
# the content of the data. RUN/.STAGE keeps them, and when they are not what it says the stage is run again.
SAID_embed    = $(EMBED) $(EMBEDDED) $(shell cat $(SOURCE) $(FILES) 2>/dev/null | cksum)
SAID_sae      = sae.py $(COMMON) $(SAE_FLAGS)
SAID_sasrec   = model.py $(COMMON) --model sasrec $(MODEL_FLAGS) $(SASREC_FLAGS)
SAID_saerec   = model.py $(COMMON) --model saerec $(MODEL_FLAGS) $(SAEREC_FLAGS)
SAID_grounded = model.py $(COMMON) --model grounded $(MODEL_FLAGS) $(GROUNDED_FLAGS)
changed  = $(shell echo "$(SAID_$(1))" | cmp -s - $(RUN)/.$(1) || echo FORCE)
remember = @echo "$(SAID_$(1))" > $(RUN)/.$(1)

.PHONY: all vectors stages planted test test-core test-half test-rest test-browser ablate interpret steer speed docs report clean help FORCE
.DELETE_ON_ERROR:

# Each of several stages has its share of the threads, and no live line that another would overwrite
SHARE    = max(torch.get_num_threads() // $(JOBS), 1)
SHARED   = OMP_NUM_THREADS="$(or $(OMP_NUM_THREADS),$(shell $(PY) -c "import torch; print($(SHARE))"))" TERM=dumb

all: .venv/ready  ## run: every stage from nothing to metrics.json and report.html
	@$(MAKE) --no-print-directory vectors
	@$(if $(filter-out 1,$(JOBS)),$(SHARED)) $(MAKE) --no-print-directory -j$(JOBS) stages

vectors: $(RUN)/embeddings.safetensors

stages: $(RUN)/metrics.json $(if $(wildcard tools/report.py),$(RUN)/report.html)

planted: data/planted/sequences.txt  ## run: the same on a world whose intents are known, and how well they are found
	$(MAKE) all DATA=data/planted EMBED=sources/lsa.py
	$(MAKE) interpret report DATA=data/planted EMBED=sources/lsa.py

CORE_TESTS   = $(sort $(wildcard tests/test_*.py))
FOLDER_TESTS = $(filter-out %__pycache__/,$(sort $(wildcard tests/*/)))

test: .venv/ready $(WEIGHTS)  ## run: set up and run all tests, in two processes
	$(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),-Otarget) test-half test-rest

test-core: .venv/ready $(WEIGHTS)  ## run: the tests of the five scripts alone
	$(PY) -m pytest -q $(CORE_TESTS)

# Two halves that take about as long
test-half: .venv/ready $(WEIGHTS)
	$(PY) -m pytest -q $(CORE_TESTS) $(filter %/sources/,$(FOLDER_TESTS))

test-rest: .venv/ready $(WEIGHTS)
	$(PY) -m pytest -q $(filter-out %/sources/,$(FOLDER_TESTS))

test-browser: .venv/ready  ## run: the tests of report.html in a headless Chromium, if one is installed
	$(PY) -m pytest -q -rs tests/tools/test_browser.py

clean:  ## run: remove runs; data, weights and the environment stay
	rm -rf runs

ablate: $(RUN)/intents.jsonl  ## measure: train every rival and variant; goes on where it was interrupted
	$(PY) studies/ablate.py $(COMMON) $(ABLATE_FLAGS)

interpret: $(RUN)/metrics.json  ## measure: how well the intents can be understood
	$(PY) studies/interpret.py $(COMMON)

steer: $(RUN)/metrics.json  ## measure: what steering moves, and what it costs
	$(PY) tools/steer.py $(COMMON)

speed: $(RUN)/metrics.json  ## measure: seconds and memory of every stage; QUICK=1 in 2 minutes
	$(PY) studies/speed.py --run $(RUN) --device $(DEVICE) $(if $(QUICK),--quick)

report: $(RUN)/metrics.json  ## look: write report.html again, with what was measured since
	$(PY) tools/report.py $(COMMON)

docs:  ## look: write docs/results.md, docs/speed.md and README's table from studies/results/
	$(PY) studies/docs.py

help:  ## look: list the targets and variables
	@for group in run measure look; do echo "$$group"; \
	  sed -nE "s/^([a-z-]+):.*## $$group: /  \1\t/p" Makefile | expand -t 16; done
	@echo "variables: DATA=$(DATA) RUN=$(RUN) SEED=$(SEED) DEVICE=$(DEVICE) JOBS=$(JOBS) EMBED=$(EMBED) EMBED_FLAGS="
	@echo "  SAE_FLAGS= MODEL_FLAGS= SASREC_FLAGS= SAEREC_FLAGS= GROUNDED_FLAGS= ABLATE_FLAGS= PYTHON=$(PYTHON)"

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

data/ml-100k/sequences.txt: | .venv/ready
	$(PY) sources/movielens.py --out data/ml-100k

data/planted/sequences.txt: | .venv/ready
	$(PY) sources/planted.py --out data/planted

$(WEIGHTS): | .venv/ready
	$(PY) -c "import embed; embed.fetch_weights()"

$(RUN)/embeddings.safetensors: $(sort $(EMBED) embed.py) saerec.py $(call changed,embed) | $(SOURCE) .venv/ready
	$(PY) $(EMBED) $(EMBEDDED)
	$(call remember,embed)

$(RUN)/intents.jsonl: $(RUN)/embeddings.safetensors sae.py saerec.py $(call changed,sae)
	$(PY) sae.py $(COMMON) $(SAE_FLAGS)
	$(call remember,sae)

$(RUN)/sasrec.safetensors: $(RUN)/embeddings.safetensors model.py sae.py saerec.py $(call changed,sasrec)
	$(PY) model.py $(COMMON) --model sasrec $(MODEL_FLAGS) $(SASREC_FLAGS)
	$(call remember,sasrec)

$(RUN)/saerec.safetensors: $(RUN)/intents.jsonl model.py sae.py saerec.py $(call changed,saerec)
	$(PY) model.py $(COMMON) --model saerec $(MODEL_FLAGS) $(SAEREC_FLAGS)
	$(call remember,saerec)

$(RUN)/grounded.safetensors: $(RUN)/intents.jsonl model.py sae.py saerec.py $(call changed,grounded)
	$(PY) model.py $(COMMON) --model grounded $(MODEL_FLAGS) $(GROUNDED_FLAGS)
	$(call remember,grounded)

$(RUN)/metrics.json: $(patsubst %,$(RUN)/%.safetensors,sasrec saerec grounded) eval.py
	$(PY) eval.py $(COMMON)

$(RUN)/report.html: $(RUN)/metrics.json $(wildcard tools/report.* tools/recommend.py tools/asked.py $(RUN)/interpret.json $(RUN)/ablation.json $(RUN)/steering.json)
	$(PY) tools/report.py $(COMMON)
