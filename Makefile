# make demo   pre-train on the built-in shapes and evaluate, in minutes on any device
# make test   run the tests
# make figures  draw the figures of the README again
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
	@echo "figures: experiments/$(DEMO)/loss-plot.png top1-acc.png views.png"

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q tests

# The figures that the README shows, from the committed logs.
FIGURES_OF = logs/cifar10-w16-24ep
figures: $(INSTALLED)
	$(RUN) -m utils.plot $(FIGURES_OF)
	mv $(FIGURES_OF)/loss-plot.png $(FIGURES_OF)/top1-acc.png imgs/

clean:
	rm -rf $(VENV)

.PHONY: demo test figures clean
