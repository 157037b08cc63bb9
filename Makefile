# make demo   pre-train on the built-in shapes and evaluate, in minutes on any device
# make test   run the tests
# make reproduce  the paper's run on a CUDA GPU, from the data to the table; ARGS="--seeds 3" and so on: options of reproduce.sh
# make figures  write the tables of the README and draw its figures again
# make clean  remove the virtual environment
.DEFAULT_GOAL := demo
PYTHON ?= python3
VENV ?= .venv

# The environment is made once, and again when the requirements change.
INSTALLED = $(VENV)/.installed
$(INSTALLED): requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

# A new name each time, so that a second demo does not meet the first one's folders.
DEMO := demo-$(shell date +%Y%m%d-%H%M%S)
RUN = $(VENV)/bin/python
LINEAR = $(RUN) main_lincls.py --dataset shapes --features cached --width 8

demo: $(INSTALLED)
	$(RUN) main.py --dataset shapes --width 8 --batch_size 64 --learning_rate 0.05 --dim 512 --pred_dim 128 --epochs 8 --eval_freq 2 --untrained --trial $(DEMO)
	$(LINEAR) --pretrained experiments/$(DEMO)/untrained.pt --trial $(DEMO)-linear-untrained
	$(LINEAR) --pretrained experiments/$(DEMO)/backbone.pt --trial $(DEMO)-linear
	@echo
	@$(RUN) -m utils.log experiments/$(DEMO) experiments/$(DEMO)-linear-untrained experiments/$(DEMO)-linear
	@echo "to look at: experiments/$(DEMO)/report.html and experiments/$(DEMO)-linear/report.html"

# Two at a time with a thread each: most tests are small, or wait for processes that start.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal tests

reproduce: $(INSTALLED)
	PYTHON=$(abspath $(RUN)) bash reproduce.sh $(ARGS)

# The figures of runs that the README shows, from the committed logs.
FIGURES := $(shell mktemp -du)
figures: $(INSTALLED)
	$(RUN) -m utils.results --update README.md logs/README.md --figures imgs
	$(RUN) -m utils.plot logs/cifar10-5000-w16-20ep-seed* logs/cifar10-5000-w16-b64-30ep-seed* --output $(FIGURES)/seeds --format png
	$(RUN) -m utils.plot logs/cifar10-w16-12ep-linear-lbfgs --output $(FIGURES)/linear --format png
	$(RUN) -m utils.studies logs/ablations-30ep --output $(FIGURES)/stop_gradient --format png
	$(RUN) -m utils.studies logs/ablations-10ep --output $(FIGURES)/studies --format png
	cp $(FIGURES)/linear/confusion.png $(FIGURES)/stop_gradient/stop_gradient.png $(FIGURES)/studies/predictor.png imgs/
	cp $(FIGURES)/seeds/std.png imgs/seeds-std.png
	cp $(FIGURES)/seeds/top1-acc.png imgs/seeds-top1-acc.png
	rm -r $(FIGURES)

clean:
	rm -rf $(VENV)

.PHONY: demo test reproduce figures clean
