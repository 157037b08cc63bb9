# make demo        pre-train on the built-in shapes and evaluate, in minutes on any device
# make test        run the tests, except the slow ones; make test-slow runs these, make test-all both
# make reproduce   run reproduce.sh; ARGS="--seeds 3" passes its options
# make clean       remove the virtual environment
.DEFAULT_GOAL := demo
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
DEMO := demo-$(shell date +%Y%m%d-%H%M%S)
LINEAR = $(RUN) main_lincls.py --dataset shapes --features cached

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

demo: $(VENV)/.installed
	$(RUN) main.py --dataset shapes --width 8 --batch_size 64 --learning_rate 0.03 --dim 512 --pred_dim 128 --epochs 8 \
		--eval_freq 2 --untrained --trial $(DEMO)
	$(LINEAR) --pretrained experiments/$(DEMO)/untrained.pt --trial $(DEMO)-untrained-linear
	$(LINEAR) --pretrained experiments/$(DEMO)/backbone.pt --trial $(DEMO)-linear
	$(RUN) -m utils.plot experiments/$(DEMO) experiments/$(DEMO)-untrained-linear experiments/$(DEMO)-linear

# Two tests at a time, with a thread each unless OMP_NUM_THREADS says otherwise.
test: $(VENV)/.installed-tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -q -n 2 --dist worksteal -m "not slow" tests

test-slow: $(VENV)/.installed-tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -q -n 2 --dist worksteal -m slow tests

test-all: test test-slow

reproduce: $(VENV)/.installed
	PYTHON=$(abspath $(RUN)) bash reproduce.sh $(ARGS)

clean:
	rm -rf $(VENV)

.PHONY: demo test test-slow test-all reproduce clean
