// The animation: one image strip for each band, moved by the slider or by the clock.
function filmShow(film, frame) {
  const times = film.dataset.times.split(" ");
  film.dataset.frame = frame;
  film.querySelectorAll(".reel").forEach(reel => {
    reel.style.backgroundPositionY = 100 * frame / (times.length - 1) + "%";
  });
  film.querySelector("input").value = times[frame];
  film.querySelector("output").textContent = "t = " + Number(times[frame]).toFixed(2);
}

function filmSeek(slider) {
  const film = slider.closest(".film");
  const distances = film.dataset.times.split(" ").map(time => Math.abs(time - slider.value));
  film.classList.remove("playing");
  filmShow(film, distances.indexOf(Math.min(...distances)));
}

function filmPlay(button) {
  button.closest(".film").classList.toggle("playing");
}

setInterval(() => document.querySelectorAll(".film.playing").forEach(film => {
  const last = film.dataset.times.split(" ").length - 1;
  film.dataset.tick = (Number(film.dataset.tick || film.dataset.frame) + 1) % (last + 20);   // a rest at the end
  filmShow(film, Math.min(film.dataset.tick, last));
}), 80);
