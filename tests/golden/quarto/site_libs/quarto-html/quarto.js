document.documentElement.dataset.quarto = "ran";
