// A click on the head of a table's column sorts its rows, once more turns them round.
document$.subscribe(() => {
  document.querySelectorAll(".md-typeset table:not([class]) th").forEach((head) => {
    head.style.cursor = "pointer"
    head.title = "sort"
    head.addEventListener("click", () => {
      const body = head.closest("table").querySelector("tbody")
      const column = [...head.parentNode.children].indexOf(head)
      const down = head.dataset.order !== "down"
      head.dataset.order = down ? "down" : "up"
      const value = (row) => row.children[column].textContent.trim()
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)]
        if (!x || !y) return x ? -1 : y ? 1 : 0 // what is not known comes last
        const order = isNaN(x) || isNaN(y) ? y.localeCompare(x) : y - x
        return down ? order : -order
      }
      body.replaceChildren(...[...body.children].sort(compare))
    })
  })
})
